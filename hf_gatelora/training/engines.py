"""What vision models with LoRA layers need of a Trainer under DeepSpeed and FSDP2."""

from transformers import Trainer

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
