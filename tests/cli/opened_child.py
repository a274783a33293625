"""Opens folders that `pared fit` wrote as users do, in a process of its own, and tells what they give."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pared


def told(folder: Path, text: Path) -> dict[str, Any]:
    """The classes of a folder's model, its greedy continuation of a text, and how well it predicts this."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    start = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model.generate(start[:, :8], max_new_tokens=8, do_sample=False)
    score = pared.evaluate(folder, text, quiet=True).loss
    return {"class": [one.__name__ for one in type(model).__mro__], "tokens": found[0].tolist(), "loss": score}


if __name__ == "__main__":
    text, *folders = map(Path, sys.argv[1:])
    sys.stdout.write(json.dumps([told(folder, text) for folder in folders]))
