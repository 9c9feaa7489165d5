"""What vision models with LoRA layers need of a Trainer under DeepSpeed and FSDP2, and the Trainer of a state."""

import gc

from transformers import Trainer, TrainerState

from ..gates.engines import check_launch, engine_for


class EngineTrainer(Trainer):
    """`Trainer` that gets CLIP and DINOv2 through `accelerator.prepare` under DeepSpeed and FSDP2.

    Attributes:
        engine: what the run is trained with.

    Raises:
        ValueError: at the start, if the processes would train apart, or under FSDP settings that lose the adapter.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.engine = engine_for(self.accelerator)
        check_launch(self.args.world_size, self.accelerator)

    def _prepare_for_training(self, *args, **kwargs):
        with self.engine.preparing(self.model):
            return super()._prepare_for_training(*args, **kwargs)


def trainer_of(state: TrainerState) -> Trainer:
    """The Trainer whose state this is: callbacks are not told, and it alone reaches all that report its log."""
    # By type: isinstance would ask objects of other libraries for their class, of which some warn.
    trainers = (found for found in gc.get_objects() if issubclass(type(found), Trainer))
    return next(found for found in trainers if getattr(found, "state", None) is state)
