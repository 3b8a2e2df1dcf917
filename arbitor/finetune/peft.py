"""Adapters in the PEFT library: which of its layers stands for which of ours.

config = peft.PeftConfig.from_pretrained(folder)
config._register_custom_module(peft_layers())
model = peft.PeftModel.from_pretrained(arbitor.load(base), folder, config=config)
"""

from torch import Tensor, nn

from arbitor.errors import UserError
from arbitor.model.heads import ByteHead
from arbitor.ternary import TernaryLinear


def peft_layers() -> dict[type[nn.Module], type[nn.Module]]:
    """PEFT's LoRA layer for each kind of linear; its forward is that of `LoraLinear`.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft.tuners.lora import Linear  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UserError("PEFT is not installed; install it with: pip install peft") from error

    class LoraHead(Linear):
        def logits(self, x: Tensor) -> Tensor:
            return self(x)

    return {TernaryLinear: Linear, ByteHead: LoraHead}
