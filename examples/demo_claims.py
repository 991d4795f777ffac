"""What the demo claims, computed without the code that is being shown: by counting, and by transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from chronicals.data.documents import Documents


def unigram_entropy(documents: Documents) -> float:
    """Nats per supervised token of the best model that ignores all context.

    It is the entropy of the documents' own counts. No fixed distribution, the training set's included, codes these
    tokens in less (Gibbs' inequality): whoever is below it on held-out documents has learnt from context.
    """
    _, counts = np.unique(documents.tokens[documents.loss_mask], return_counts=True)
    return float(-(counts / counts.sum() * np.log(counts / counts.sum())).sum())


def load(folder: Path) -> Any:
    """The checkpoint, by transformers, in float32."""
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def transformers_loss(folder: Path, documents: Documents) -> float:
    """Nats per supervised token of the checkpoint: transformers' model, one document at a time, nothing packed."""
    model, total, count = load(folder), 0.0, 0
    for tokens, mask in documents:
        ids = torch.tensor(tokens, dtype=torch.int64)
        losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        trained = torch.tensor(mask)[1:]
        total, count = total + losses[trained].sum().item(), count + int(trained.sum())
    return total / count


def questions(chats: Path, number: int = 4) -> list[tuple[str, str]]:
    """A few (question, true answer) pairs, spread evenly over `chats`."""
    rows = [json.loads(line)["messages"] for line in chats.read_text(encoding="utf-8").splitlines()]
    return [(user["content"], assistant["content"]) for user, assistant in rows[:: len(rows) // number][:number]]


def completions(folder: Path, tokenizer_folder: Path, prompts: Iterable[str]) -> list[str]:
    """The checkpoint's greedy answers, by transformers' `generate`."""
    model, tokenizer, answers = load(folder), AutoTokenizer.from_pretrained(tokenizer_folder), []
    how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **how)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers
