"""A process of somebody who has transformers and peft alone: writes the outputs of adapters on the Hub.

Reads lines `family<TAB>repository<TAB>revision<TAB>file`.
"""

import sys

sys.modules["hf_gatelora"] = None  # importing it raises ImportError
stdout, sys.stdout = sys.stdout, sys.stderr  # nothing but answers on stdout

import torch
from models import FAMILIES, outputs_of
from peft import PeftModel

for line in sys.stdin:
    name, repo, revision, file = line.rstrip("\n").split("\t")
    try:
        model = PeftModel.from_pretrained(FAMILIES[name]["model"](), repo, revision=revision)
        torch.save(outputs_of(FAMILIES[name], model), file)
        print("ok", file=stdout, flush=True)
    except Exception as error:
        print("error", repr(error).replace("\n", " "), file=stdout, flush=True)
