"""`chronicals init`: a commented job to start from.

Only what a newcomer decides is written; everything else keeps its default, which the run's header prints.
Left out: questions on the terminal. The file is the conversation.
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from chronicals.errors import UserError

TEMPLATE = """\
# A fine-tuning job. Look at it first:  chronicals inspect {out}
# Then run it:                          chronicals train {out}
# Any value can be replaced on the way: chronicals train {out} learning_rate=1e-5 num_epochs=3

# The model to start from: a folder, or a repository of the Hugging Face hub.
base_model: {model}

# The chats to learn. JSON, JSONL, Parquet, Arrow or CSV (also .gz, .zst, folders, globs), or a data set of the hub.
# Rows may be `messages`, `conversations`, Alpaca, `prompt`/`completion` or `text`: the form is found by itself.
datasets:
  - path: {data}
    # split: train[:10%]        # a part of it
    # type: chat_template       # or sharegpt, alpaca, completion: names the form instead of finding it

# The share held out to evaluate on. Its loss is computed each epoch and after the last step.
val_set_size: 0.05

# Documents are packed into bins of this many tokens; longer ones are cut or dropped (excess_length_strategy).
sequence_len: 2048

# One optimizer step trains micro_batch_size * gradient_accumulation_steps bins. How the two divide them changes
# memory and speed, never the result.
micro_batch_size: 1
gradient_accumulation_steps: 8

num_epochs: 1
learning_rate: 2e-5           # decays linearly to zero; with an adapter: 2e-4
# adapter: lora               # trains thin matrices beside frozen weights; qlora keeps those in 4 bits
warmup_ratio: 0.03

# The final model, its tokenizer, checkpoints, metrics.jsonl and this job as it was run.
output_dir: {output_dir}
"""


def init(model: str, data: str, out: Path) -> None:
    """Writes the job to `out`.

    Raises:
        UserError: `out` exists, its folder does not, or `model` or `data` is a path on this machine that is not there.
    """
    if out.exists():
        raise UserError("the file exists already", "give another name with --out, or remove it", file=out)
    if not out.absolute().parent.is_dir():
        raise UserError(f"the folder {out.parent} does not exist", f"create it: mkdir -p {out.parent}", file=out)
    for option, value in (("--model", model), ("--data", data)):
        is_glob = any(character in value for character in "*?[")
        if is_path(value) and not is_glob and not Path(value).expanduser().exists():
            mend = "check the path; a hub name has no suffix and no leading . or /"
            raise UserError(f"{option} {value} does not exist", mend)
    output_dir = f"outputs/{Path(data.rstrip('/')).name.split('.')[0] or 'run'}"
    values = {"model": model, "data": data, "output_dir": output_dir}
    out.write_text(TEMPLATE.format(out=out, **{key: scalar(value) for key, value in values.items()}), encoding="utf-8")


def is_path(value: str) -> bool:
    """Whether `value` can only be a file or folder of this machine, never a hub name."""
    suffixes = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".gz", ".zst")
    return value.startswith((".", "/", "~")) or value.endswith(suffixes) or value.count("/") > 1 or os.path.isdir(value)


def scalar(value: str) -> str:
    """`value` as one YAML scalar, quoted where YAML would read something else than this text."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True).removesuffix("...\n").strip()
