"""The whole recipe in small, run once: FOLDER/model, and what it left in FOLDER/model.work."""

import pytest
import torch

from sphinx_fast.train.mini import recipe


@pytest.fixture(scope="package")
def smoke(tmp_path_factory):
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("run") / "model"
    recipe.main(["--out", str(out), "--smoke"])
    torch.set_num_threads(threads)
    return out
