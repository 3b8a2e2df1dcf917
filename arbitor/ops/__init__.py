"""Operations on packed trits and integer state, one folder each.

`reference.py` in a folder is the truth in plain torch and the path that runs on a CPU; `__init__.py` holds
the schema as a registered library op (`torch.ops.arbitor.*`), its shape rule for tracing, and the dispatch.
"""
