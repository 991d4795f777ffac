"""`chronicals chat`: try the tuned model through transformers' own `generate`, as every other tool will run it.

On a terminal it is a conversation; with `--prompt`, or with text on stdin, one question and one answer.
Left out: our own sampling loop. What is tried here must be what was saved, loaded by somebody else's code.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chronicals.errors import UserError, read_json

ADAPTER_FILE = "adapter_config.json"
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt")
FAREWELL = "Ctrl-D ends, /new starts a new conversation."


def chat(
    folder: str, *, prompt: str | None, system: str | None, max_new_tokens: int, temperature: float | None
) -> None:
    """Answers `prompt`, or all of stdin, or turn after turn on a terminal; the answers go to stdout as they are made.

    Raises:
        UserError: no model there, an empty question, or a system message for a model without a chat template.
    """
    path = model_folder(folder)
    interactive = prompt is None and sys.stdin.isatty()
    question = prompt if prompt is not None or interactive else sys.stdin.read()
    if question is not None and not question.strip():
        raise UserError("the question is empty", "give one with --prompt or on stdin")
    partner = Partner(path, system, max_new_tokens, temperature)
    if question is not None:
        partner.answer(question.strip("\n"))
        return
    sys.stdout.write(f"{folder} on {partner.model.device}. {FAREWELL}\n")
    while (line := read_line()) is not None:
        if line.strip() == "/new":
            partner.restart()
        elif line.strip():
            partner.answer(line)


def read_line() -> str | None:
    """One line from the terminal; None at its end."""
    try:
        return input("\n> ")
    except EOFError:
        return None


def model_folder(folder: str) -> Path:
    """The folder with the model's files, local or from the hub; a run without its final model names its checkpoints."""
    from chronicals.hub import resolve

    path = Path(folder)
    if not path.is_dir():
        return resolve(folder)
    if not ((path / "config.json").is_file() or (path / ADAPTER_FILE).is_file()):
        name_checkpoint(path, "chat", ("config.json", ADAPTER_FILE))
        raise UserError("no model here (no config.json)", "give a run's output_dir or a model folder", file=path)
    return path


def name_checkpoint(run: Path, verb: str, files: Sequence[str]) -> None:
    """Raises UserError with the newest checkpoint that has one of these files, where the run has one at all."""
    saved = [file.parent for name in files for file in run.glob(f"checkpoint-*/{name}")]
    if saved:
        newest = max(saved, key=lambda checkpoint: int(checkpoint.name.split("-")[-1]))
        raise UserError(
            "the run has no final model yet", f"try its last checkpoint: chronicals {verb} {newest}", file=run
        )


def find_base(adapter: Path, patterns: Sequence[str], mend: str) -> Path:
    """The folder of the base model that an adapter names, local or from the hub.

    Args:
        adapter: its folder.
        patterns: globs of the files to download.
        mend: what the user can do where there is none.

    Raises:
        UserError: the adapter names none, or it cannot be had.
    """
    from chronicals.hub import resolve

    file = adapter / ADAPTER_FILE
    named = read_json(file, "get it again")
    name = named.get("base_model_name_or_path") if isinstance(named, dict) else None
    if not name or not isinstance(name, str):
        raise UserError("base_model_name_or_path is missing", mend, file=file)
    try:
        return resolve(name, revision=named.get("revision"), allow_patterns=patterns)
    except UserError as error:
        raise UserError(f"the base model: {error.reason}", f"{mend}; {error.mend}", file=file) from error


class Partner:
    """The model, its tokenizer and the conversation so far."""

    def __init__(self, path: Path, system: str | None, max_new_tokens: int, temperature: float | None) -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        base = _base_of(path)
        tokenizer = path if base is None or (path / "tokenizer_config.json").is_file() else base
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer)
            model: Any = AutoModelForCausalLM.from_pretrained(base or path, dtype="auto")
            model = model if base is None else _beside(model, base, path)
        except UserError:  # a ValueError too
            raise
        except (OSError, ValueError, SafetensorError) as error:
            mend = "if a run was saving to it, take its last checkpoint; else get the files again"
            raise UserError(f"transformers cannot load it ({error})", mend, file=path) from error
        if system is not None and self.tokenizer.chat_template is None:
            raise UserError("this model has no chat template, so no system message", "leave --system out", file=path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(device).eval()
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        if temperature is not None:
            self.options |= {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature > 0 else {})
        self.system = system
        self.restart()

    def restart(self) -> None:
        """Forgets everything but the system message."""
        self.turns = [] if self.system is None else [{"role": "system", "content": self.system}]

    def answer(self, question: str) -> str:
        """The model's next turn, streamed to stdout and remembered. Without a chat template: `question`, continued."""
        from transformers import TextStreamer

        if self.tokenizer.chat_template is None:
            inputs = self.tokenizer(question, return_tensors="pt")
        else:
            self.turns.append({"role": "user", "content": question})
            inputs = self.tokenizer.apply_chat_template(
                self.turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        prompt_len = inputs["input_ids"].shape[1]
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = self.model.generate(**inputs.to(self.model.device), streamer=streamer, **self.options)
        text = self.tokenizer.decode(output[0, prompt_len:], skip_special_tokens=True)
        if self.tokenizer.chat_template is not None:
            self.turns.append({"role": "assistant", "content": text})
        return text


def _base_of(path: Path) -> Path | None:
    """The base model's folder, where `path` holds an adapter."""
    from chronicals.models.hf import DOWNLOADS

    if not (path / ADAPTER_FILE).is_file():
        return None
    if importlib.util.find_spec("peft") is None:
        raise UserError("this is an adapter, which transformers loads with peft", "pip install peft", file=path)
    return find_base(path, (*DOWNLOADS, *TOKENIZER), "write its folder into base_model_name_or_path")


def _beside(model: Any, base: Path, adapter: Path) -> Any:
    """The base model with the adapter beside it, its vocabulary made as large as the adapter has rows."""
    from peft import PeftModel

    from chronicals.adapters.peft_files import in_memory, vocabulary_rows

    if not any((adapter / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise UserError("the adapter's weights are missing (adapter_model.safetensors)", "get them again", file=adapter)
    rows = vocabulary_rows(adapter)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    mend = "write the right one into base_model_name_or_path"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # told below
            warnings.simplefilter("ignore", FutureWarning)  # peft's calls of what transformers will drop
            beside = PeftModel.from_pretrained(model, adapter)
    except RuntimeError as error:
        raise UserError(f"it does not fit the base model {base} ({error})", mend, file=adapter) from error
    told = beside.load_adapter(adapter, "default")  # once more, as it alone tells of tensors that do not fit
    foreign = [name for name in told.unexpected_keys if in_memory(name) is None]
    for what, names in (("is missing", told.missing_keys), ("belongs to no target", foreign)):
        if names:
            name = names[0].replace(".default", "")
            raise UserError(f"tensor {name} {what}", f"get the adapter's files again, or {mend}", file=adapter)
    return beside
