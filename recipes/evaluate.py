"""Measure any LoRA adapter, of this package or of PEFT, on any suite, at any scale (WiSE-FT).

    accelerate launch recipes/evaluate.py clip CONFIG.yaml --adapter user/adapter --wise 0.25 0.5 0.75

The configuration and its fields are those of the recipe that is named first, `clip` or `dinov2`: the model, the suite,
and the training images, which say what the classes are. Nothing is trained but the linear probe of `dinov2`.
`gatelora wise` writes the scaled adapter.
"""

import sys
from dataclasses import dataclass, field

from accelerate import PartialState
from common import parse_arguments
from methods import Run
from peft import PeftModel
from tasks import named_task

from hf_gatelora import GatedLoraTrainingArguments


@dataclass
class EvaluateArguments:
    """What is measured."""

    adapter: str = field(default=None, metadata={"help": "folder or Hub id of a LoRA adapter"})

    def __post_init__(self):
        if self.adapter is None:
            raise ValueError("--adapter is missing: give the folder or the Hub id of a LoRA adapter.")


def main(argv: list[str]) -> None:
    task_class, recipe_arguments = named_task(argv)
    classes = [recipe_arguments, GatedLoraTrainingArguments, EvaluateArguments]
    arguments, training, evaluated = parse_arguments(classes, argv[1:])
    run = Run(task_class, arguments, training)
    model = PeftModel.from_pretrained(run.task.base(), evaluated.adapter).to(training.device)
    run.finish(run.measured("adapter", model))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
