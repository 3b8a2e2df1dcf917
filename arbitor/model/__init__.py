"""ARB: a byte-level model without any float weight."""

from arbitor.model.arb import ARBModel, ARBOutput
from arbitor.model.ledger import KVLedger

__all__ = ["ARBModel", "ARBOutput", "KVLedger"]
