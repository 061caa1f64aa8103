"""Makes an exit branch's folder ready to upload to a hub: the branch's two files, and a model card that says what they are for.

publish("runs/llama8b/exit_branch", "upload", name="me/llama-8b-eesd", base_model="meta-llama/Llama-3.1-8B", license="llama3.1")
# then, in a shell: hf upload me/llama-8b-eesd upload
"""

import json
import pathlib
import shutil
from collections.abc import Mapping

from huggingface_hub import ModelCardData

from eesd_jax.weights.branch_folder import INFO_NAME, TENSORS_NAME, BranchFolder, BranchInfo, replace_files

CARD_NAME = "README.md"
LIBRARY = "eesd-jax"
TAGS = ["eesd", "speculative-decoding", "early-exit", "self-distillation", "jax"]


def publish(
    source: str | pathlib.Path,
    folder: str | pathlib.Path,
    *,
    name: str,
    base_model: str,
    license: str,
    measured: Mapping[str, str | float] | None = None,
) -> None:
    """Writes the folder to upload.

    Args:
      source: the branch's folder, as training leaves it.
      folder: where to write; made if need be.
      name: the hub id under which it will be found.
      base_model: the target's hub id.
      license: of the branch, as hubs spell it (`apache-2.0`).
      measured: what was measured with it, such as acceptance or tokens per round, by what it is called.

    Raises:
      UserError: the source is no exit branch, or the folder cannot be written.
    """
    branch = BranchFolder(pathlib.Path(source).expanduser())
    text = model_card(branch.info, name, base_model, license, measured or {})
    replace_files(
        folder,
        {
            TENSORS_NAME: lambda path: shutil.copyfile(branch.path / TENSORS_NAME, path),
            INFO_NAME: lambda path: shutil.copyfile(branch.path / INFO_NAME, path),
            CARD_NAME: lambda path: path.write_text(text, encoding="utf-8"),
        },
    )


def model_card(info: BranchInfo, name: str, base_model: str, license: str, measured: Mapping[str, str | float]) -> str:
    """The text of a model card, its front matter included. Arguments as in `publish`."""
    front_matter = ModelCardData(base_model=base_model, license=license, library_name=LIBRARY, tags=TAGS).to_yaml()
    training = f"```json\n{json.dumps(info.training, indent=2)}\n```" if info.training else "Never trained: started as below, for tests."
    rows = "\n".join(f"| {what} | {value} |" for what, value in measured.items())
    acceptance = f"| | |\n|---|---|\n{rows}" if measured else "Not measured."
    return f"""---
{front_matter}
---

# {name.rpartition("/")[2]}

An exit branch for [{base_model}](https://huggingface.co/{base_model}): one transformer block, a norm and an LM head behind the
model's first {info.exit_layer} blocks. With it the model drafts its own next tokens (early-exiting speculative decoding, EESD; Liu et al.,
Findings of ACL 2024) and checks them in one pass, so it writes the same text in fewer passes. It is of no use without that model.

## Use

    python infer/generate.py --model={base_model} --exit_branch={name} --prompt="Why is the sky blue?"

```python
import eesd_jax

lm = eesd_jax.load("{base_model}", exit_branch="{name}")
print(lm.generate("Why is the sky blue?", controller=lm.controller("beta")).text)
```

## Acceptance

{acceptance}

## Training

{training}

| | |
|---|---|
| exit after block | {info.exit_layer} |
| draft vocabulary | {info.draft_vocab_size} of {info.vocab_size} tokens |
| started from | {info.start} |
| target's config hash | `{info.target_config_hash}` |
| target's weight fingerprint | `{info.target_fingerprint}` |
"""
