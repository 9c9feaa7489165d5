"""A process with stock PEFT only: reads `model<TAB>directory` lines, loads the adapter, writes its outputs."""

import os
import sys
import warnings

sys.modules["hf_gatelora"] = None  # importing it raises ImportError
os.environ["HF_HUB_OFFLINE"] = "1"
stdout, sys.stdout = sys.stdout, sys.stderr  # nothing but answers on stdout

import torch
from backbones import BACKBONES
from models import FAMILIES, outputs_of
from peft import PeftModel

MODELS = FAMILIES | BACKBONES

for line in sys.stdin:
    name, directory = line.rstrip("\n").split("\t")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            model = PeftModel.from_pretrained(MODELS[name]["model"](), directory)
        path = os.path.join(directory, "stock-outputs.pt")
        torch.save(outputs_of(MODELS[name], model), path)
        print("ok", path, file=stdout, flush=True)
    except Exception as error:
        print("error", repr(error).replace("\n", " "), file=stdout, flush=True)
