"""The notebooks run, on a tiny model; and as they are committed, they have been run and show nothing of the machine that did."""

import json
import os
import pathlib
import re

import jax.numpy as jnp
import pytest
from commands import ROOT

from eesd_jax.model.exit_branch import init_exit_branch
from eesd_jax.weights import branch_folder
from eesd_jax.weights.load import load_model

SETTINGS = {
    "quickstart": {"MODEL": "tiny", "EXIT_BRANCH": "branch", "NEW_TOKENS": 12},
    "train_your_own_branch": {
        "MODEL": "tiny",
        "RESPONSES": 24,
        "ANSWER_TOKENS": 16,
        "STEPS": 10,
        "SEQUENCE_LENGTH": 64,
        "DRAFT_VOCAB": 0,
    },
}


def path_of(name: str) -> pathlib.Path:
    return ROOT / "notebooks" / f"{name}.ipynb"


def test_all_notebooks_are_tested():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == sorted(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_committed_notebooks_show_what_they_gave(name):
    cells = [cell for cell in json.loads(path_of(name).read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    texts = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"/(tmp|root|home|work|usr)/|https?://", texts)
    if name == "quickstart":
        assert "identical: yes" in texts


def write_branch(folder: pathlib.Path) -> None:
    """An untrained branch of the model `tiny`."""
    model = load_model("tiny", jnp.dtype("float32"))
    branch = init_exit_branch(model.config, model.params, 1, "zero")
    info = branch_folder.describe(model.config, model.params, branch, exit_layer=1, start="zero", calibration=(1.0, 0.0), training={})
    branch_folder.save_branch(folder, branch, info)


@pytest.mark.notebooks
@pytest.mark.parametrize("name", SETTINGS)
def test_notebooks_run(name, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    notebook = nbformat.read(path_of(name), as_version=4)
    settings = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    assert all(re.search(rf"\b{setting}\b", settings.source) for setting in SETTINGS[name])
    settings.source += "".join(f"\n{setting} = {value!r}" for setting, value in SETTINGS[name].items())
    # As in a clone, whose files it does not touch.
    for folder in ("eesd_jax", "train", "infer"):
        os.symlink(ROOT / folder, tmp_path / folder)
    (tmp_path / "notebooks").mkdir()
    write_branch(tmp_path / "branch")
    monkeypatch.setenv("EESD_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device, as a notebook has it
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path / "notebooks")}}).execute()
    texts = "".join("".join(output.get("text", "")) for cell in notebook.cells for output in cell.get("outputs", ()))
    if name == "quickstart":
        assert "identical: yes" in texts
    else:
        assert (tmp_path / "runs" / "notebook" / "exit_branch" / "config.json").exists()
        assert (tmp_path / "runs" / "notebook" / "benchmark" / "table.md").exists()
