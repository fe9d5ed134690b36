"""Uploads a folder that compress wrote, with its model card, to the Hugging Face Hub.

    python tools/push.py runs/vitb14 OWNER/NAME --dry-run
    python tools/push.py runs/vitb14 OWNER/NAME --private

--dry-run lists what would be uploaded, without a network. The token is that of "hf auth login", or HF_TOKEN. model_card puts
measured accuracies into the card first.
"""

import logging
from pathlib import Path
from typing import Any

from vitoats.cli import config_file, flags
from vitoats.common.errors import InputError, RunError, one_line
from vitoats.common.manifest import is_record

UPLOADED = (".json", ".safetensors", "README.md")  # nothing else that may lie in the folder

log = logging.getLogger("vitoats")


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, uploads; returns the JSON line.

    Raises:
        InputError: the folder was not written by compress, or the name is none of the Hub's.
        RunError: the Hub refused the upload, or cannot be reached.
    """
    parser = flags.parser("push", __doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that compress wrote")
    parser.add_argument("repo", metavar="OWNER/NAME", help="the repository, which is made where there is none")
    parser.add_argument("--private", action="store_true", help="for your eyes only, where the repository is made")
    parser.add_argument("--dry-run", action="store_true", help="only list the files")
    args = config_file.parse(parser, argv)

    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    from vitoats.loading.checkpoint import is_checkpoint

    if not is_checkpoint(args.folder):
        raise InputError(f"{args.folder} was not written by compress (it has no vitoats.json): name a folder that was")
    try:
        validate_repo_id(args.repo)
    except HFValidationError as error:
        raise InputError(f"{args.repo!r} is no name of the Hub: use OWNER/NAME") from error
    if args.repo.count("/") != 1:
        raise InputError(f"{args.repo!r} is no name of the Hub: use OWNER/NAME")
    found = (file.name for file in args.folder.iterdir() if file.is_file() and file.name.endswith(UPLOADED))
    files = sorted(name for name in found if not is_record(name))  # those tell of this machine's folders
    megabytes = sum((args.folder / name).stat().st_size for name in files) / 1e6
    for name in files:
        log.info("%10.2f MB  %s", (args.folder / name).stat().st_size / 1e6, name)
    result: dict[str, Any] = {"repo": args.repo, "files": files, "mb": megabytes, "uploaded": not args.dry_run}
    if args.dry_run:
        return result
    hub = HfApi()
    try:
        hub.create_repo(args.repo, private=args.private, exist_ok=True)
        done = hub.upload_folder(repo_id=args.repo, folder_path=args.folder, allow_patterns=files)
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise RunError(f"the Hub refused the upload: {one_line(error)} (log in by: hf auth login)") from error
    except (OSError, httpx2.HTTPError) as error:
        raise RunError(f"the Hub cannot be reached: {one_line(error)}") from error
    return result | {"url": str(done.commit_url)}
