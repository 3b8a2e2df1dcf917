"""Rows of a table of trits by id: equal to rows of the decoded table."""

import pytest
import torch

from arbitor.ops.trit_codec import ternary_decode, trit_pack
from arbitor.ops.trit_gather import ternary_gather


def table(rows, width, group):
    generator = torch.Generator().manual_seed(width)
    trits = torch.randint(-1, 2, (rows, width), generator=generator, dtype=torch.int8)
    groups = -(-width // group)
    return trit_pack(trits), torch.randint(-62, 32, (rows, groups), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize(("width", "group"), [(1, 1), (40, 40), (161, 161), (161, 6), (320, 32)])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_rows_of_the_decoded_table(width, group, shape, dtype):
    packed, exponent = table(11, width, group)
    ids = torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(1))
    found = ternary_gather(packed, exponent, ids, width, group, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, ternary_decode(packed, exponent, width, group, dtype)[ids])


def test_an_id_that_is_no_row_is_refused_on_a_cpu():
    with pytest.raises(IndexError):
        ternary_gather(*table(3, 5, 5), torch.tensor([0, 3]), 5, 5, torch.float32)


def test_opcheck():
    arguments = *table(3, 40, 8), torch.tensor([[2, 0], [1, 1]]), 40, 8, torch.bfloat16
    torch.library.opcheck(torch.ops.arbitor.ternary_gather, arguments)
