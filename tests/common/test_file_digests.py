"""Digests of files: names and contents count, files that do not exist do not."""

from vitoats.common.file_digests import file_sha256, files_sha256


def test_digests_of_files_see_names_and_contents(tmp_path):
    digests = set()
    for i, (name, content) in enumerate((("a", "1"), ("a", "2"), ("b", "1"))):
        (tmp_path / str(i)).mkdir()
        file = tmp_path / str(i) / name
        file.write_text(content)
        digests |= {files_sha256([file]), file_sha256(file)}
    assert len(digests) == 3 + 2
    assert files_sha256([file, tmp_path / "none"]) == files_sha256([file])
