"""A process of somebody who has transformers and peft alone: prints the outputs of an adapter on the Hub.

python stranger.py FAMILY REPO OUTPUT [REVISION]
"""

import sys

sys.modules["hf_gatelora"] = None  # importing it raises ImportError

import torch
from models import FAMILIES, outputs_of
from peft import PeftModel

name, repo, output, *revision = sys.argv[1:]
model = PeftModel.from_pretrained(FAMILIES[name]["model"](), repo, **({"revision": revision[0]} if revision else {}))
torch.save(outputs_of(FAMILIES[name], model), output)
