"""The notebook runs from top to bottom."""

import nbformat
import pytest

from tests.examples.test_serve import EXAMPLES

client = pytest.importorskip("nbclient")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    client.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
