"""Sampling: which bytes may come out, and what the model is given."""

import math
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from arbitor.config import ModelConfig
from arbitor.errors import UserError
from arbitor.generate import generate, generate_stream, sample_id
from arbitor.model import ARBModel
from arbitor.model.arb import ARBOutput
from arbitor.model.vocab import CONTROL_IDS, EOS, PAD, STOP
from arbitor.ternary import TernaryLinear, VoteOptimizer

CTX = 24


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        dim=40,
        num_prelude_layers=2,
        num_heads=2,
        head_dim=6,
        rope_dim=4,
        value_dim=10,
        kv_latent_dim=20,
        ffn_dim=40,
        ctx=CTX,
    )
    return never_ending(ARBModel(config=config))


def never_ending(model):
    """The model with EOS and STOP made impossible."""
    logits = model.head.logits
    ends = torch.tensor([EOS, STOP])
    model.head.logits = lambda x, **options: logits(x, **options).index_fill(-1, ends, -1000.0)
    return model


class Scripted:
    """Stands in for a model: returns given logits at every call, and notes which ids it was given."""

    def __init__(self, logits, ctx=CTX):
        self.logits = logits
        self.config = ModelConfig(ctx=ctx, num_prelude_layers=1)
        self.given = []
        self.contexts = []

    def __call__(self, ids, *, ledger, prefix=None):
        if ledger.num_ids == 0:
            self.contexts.append([])
        ledger.extend(ids)
        self.given.append(ids[0].tolist())
        self.contexts[-1] += ids[0].tolist()
        logits = self.logits(len(self.given) - 1) if callable(self.logits) else self.logits
        return ARBOutput(logits.expand(1, ids.shape[1], 288), None)


def favouring(*ids, by=30.0):
    logits = torch.zeros(288)
    logits[list(ids)] = by
    return logits


def test_equal_seeds_give_equal_bytes(model):
    first = generate(model, b"abc", 60, seed=7)
    assert len(first) == 60
    assert generate(model, b"abc", 60, seed=7) == first
    assert generate(model, b"abc", 60, seed=8) != first
    assert model.generate(b"abc", 60, seed=7) == first


def test_without_a_seed_draws_differ_and_the_global_generator_stays(model):
    state = torch.get_rng_state()
    assert generate(model, b"abc", 60) != generate(model, b"abc", 60)
    assert torch.equal(torch.get_rng_state(), state)


def test_temperature_zero_needs_no_seed(model):
    assert generate(model, b"abc", 40, temperature=0) == generate(model, b"abc", 40, temperature=0, seed=3)


def test_streaming_gives_the_same_bytes_one_by_one(model):
    whole = generate(model, "né", 40, seed=1)
    pieces = []
    assert generate(model, "né", 40, seed=1, stream=pieces.append) == whole
    assert [len(piece) for piece in pieces] == [1] * 40
    assert b"".join(pieces) == whole
    assert b"".join(generate_stream(model, "né", 40, seed=1)) == whole


def test_streaming_draws_no_further_than_asked():
    scripted = Scripted(favouring(65))
    stream = generate_stream(scripted, b"abc", 40, seed=0)
    assert scripted.given == []
    assert next(stream) == b"A"
    assert scripted.given == [[97, 98, 99]]


def test_str_and_its_utf8_are_the_same_prompt(model):
    assert generate(model, "héé€", 20, seed=2) == generate(model, "héé€".encode(), 20, seed=2)


def test_output_may_be_any_bytes():
    scripted = Scripted(favouring(0xFF))
    assert generate(scripted, b"\xfe\x00", 3, temperature=0) == b"\xff\xff\xff"


@pytest.mark.parametrize(
    ("prompt", "given"),
    [
        (b"", [PAD, PAD, PAD]),
        (b"a", [PAD, PAD, 97]),
        (b"ab", [PAD, 97, 98]),
        (b"abc", [97, 98, 99]),
        (bytes(range(CTX - 1)), list(range(CTX - 1))),
        (bytes(range(CTX)), list(range(1, CTX))),
        (bytes(range(200)), list(range(200 - CTX + 1, 200))),
    ],
)
def test_prompt_is_padded_on_the_left_or_cut_to_the_context(prompt, given):
    scripted = Scripted(favouring(65))
    generate(scripted, prompt, 1, seed=0)
    assert scripted.given == [given]


def test_a_full_context_goes_on_from_its_last_half():
    scripted = Scripted(lambda call: favouring(call % 256))
    drawn = generate(scripted, b"xyz", 100, temperature=0)
    text = b"xyz" + drawn
    assert drawn == bytes(range(100))
    end = 0
    for index, context in enumerate(scripted.contexts):
        assert len(context) <= CTX - 1
        if index < len(scripted.contexts) - 1:
            assert len(context) == CTX - 1
        begin = 0 if index == 0 else end + 1 - CTX // 2
        assert bytes(context) == text[begin : begin + len(context)]
        end = begin + len(context)
    # The last byte drawn is never read.
    assert end == len(text) - 1
    # Every context but the first reads half of itself at once; everything else is read byte by byte.
    assert Counter(map(len, scripted.given)) == {
        3: 1,
        CTX // 2: len(scripted.contexts) - 1,
        1: 100 - len(scripted.contexts),
    }


@pytest.mark.parametrize("ctx", [4, 5, 8, 9, 24])
def test_equals_the_whole_forward_without_a_ledger(ctx):
    """Greedy bytes in fp64 without activation rounding, so that no rounding can change the choice."""
    torch.manual_seed(3)
    model = ARBModel(config=ModelConfig(dim=40, num_prelude_layers=2, kv_latent_dim=20, ffn_dim=40, ctx=ctx))
    rows = model.embed.forward
    model.embed.forward = lambda ids: rows(ids).double()
    model.head.logits = partial(model.head.logits, quantize=False)
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            module.forward = partial(module.forward, quantize=False)
    context = [PAD, ord("a"), ord("b")]
    expected = bytearray()
    for _ in range(50):
        if len(context) == ctx:
            context = context[-max(ctx // 2, 3) :]
        logits = model(torch.tensor([context])).logits[0, -1, :256]
        expected.append(int(logits.argmax()))
        context.append(expected[-1])
    assert generate(never_ending(model), b"ab", 50, temperature=0) == bytes(expected)


@pytest.mark.parametrize("end", [EOS, STOP])
def test_ends_at_eos_and_stop(end):
    scripted = Scripted(lambda call: favouring(65) if call < 4 else favouring(end))
    assert generate(scripted, b"", 50, temperature=0) == b"AAAA"
    assert generate(Scripted(favouring(end)), b"abc", 50, seed=0) == b""


def test_no_other_control_token_comes_out():
    """All control tokens are overwhelmingly likely, and a byte far behind them: the byte is drawn."""
    others = [token for name, token in CONTROL_IDS.items() if name not in ("EOS", "STOP")]
    logits = favouring(*others, by=500.0)
    logits[66] = 100.0
    for temperature in (0, 1.0):
        assert generate(Scripted(logits), b"", 20, temperature=temperature, seed=0) == b"B" * 20


def test_number_of_bytes(model):
    assert generate(model, b"abc", 0, seed=0) == b""
    assert len(generate(model, b"abc", 1, seed=0)) == 1
    assert len(generate(model, b"abc", seed=0)) == 400


def test_generating_leaves_the_model_and_its_training_as_they_were(model):
    model = ARBModel(config=model.config)
    optimizer = VoteOptimizer(model)
    before = {name: tensor.clone() for name, tensor in (model.state_dict() | optimizer.named_state()).items()}
    model.train()
    generate(model, b"abc", 30, seed=0)
    assert model.training
    optimizer.step()
    after = model.state_dict() | optimizer.named_state()
    assert all(torch.equal(before[name], after[name]) for name in before)


def draws(logits, count=4000, **settings):
    generator = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    return Counter(sample_id(logits, generator=generator, **settings) for _ in range(count))


def assert_drawn_as(counts, probabilities):
    """Every frequency within five standard deviations of a binomial; nothing of probability 0 drawn."""
    total = sum(counts.values())
    assert set(counts) <= {index for index, p in enumerate(probabilities) if p > 0}
    for index, p in enumerate(probabilities):
        assert abs(counts[index] - total * p) <= 5 * math.sqrt(total * p * (1 - p)), (index, counts)


PROBABILITIES = [0.1, 0.4, 0.05, 0.3, 0.15]
LOGITS = torch.tensor(PROBABILITIES).log()


def test_plain_draws_follow_the_probabilities():
    assert_drawn_as(draws(LOGITS), PROBABILITIES)


def test_temperature_sharpens():
    squares = [p * p for p in PROBABILITIES]
    assert_drawn_as(draws(LOGITS, temperature=0.5), [s / sum(squares) for s in squares])


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (5, range(5)), (99, range(5))]
)
def test_top_k_keeps_the_k_most_probable(top_k, kept):
    mass = sum(PROBABILITIES[index] for index in kept)
    wanted = [p / mass if index in kept else 0.0 for index, p in enumerate(PROBABILITIES)]
    assert_drawn_as(draws(LOGITS, top_k=top_k), wanted)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 3, 4]),
        (0.96, range(5)),
        (1.0, range(5)),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    mass = sum(PROBABILITIES[index] for index in kept)
    wanted = [p / mass if index in kept else 0.0 for index, p in enumerate(PROBABILITIES)]
    assert_drawn_as(draws(LOGITS, top_p=top_p), wanted)


def test_top_p_counts_what_top_k_has_left():
    """Of 0.4, 0.3, 0.15 the first has 0.47: below 0.5, so two stay; of all five, 0.4 + 0.3 + ... as well."""
    assert set(draws(LOGITS, top_k=3, top_p=0.46)) == {1}
    assert set(draws(LOGITS, top_k=0, top_p=0.46)) == {1, 3}


def test_equally_probable_ids_count_one_by_one():
    assert set(draws(torch.zeros(6), top_k=2)) == {0, 1}
    assert set(draws(torch.zeros(4), top_p=0.5)) == {0, 1}


def test_extreme_logits_and_temperatures():
    assert set(draws(torch.tensor([1e30, 0.0, -1e30]), count=50)) == {0}
    assert set(draws(LOGITS, count=50, temperature=1e-300)) == {1}
    assert set(draws(torch.tensor([-math.inf, 0.0]), count=50)) == {1}
    assert_drawn_as(draws(LOGITS, temperature=1e9), [0.2] * 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_bytes": -1}, "max_bytes is -1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"prompt": 5}, "not int"),
    ],
)
def test_bad_settings_are_named_at_the_call(settings, message):
    unused = SimpleNamespace()
    for function in (generate, generate_stream):
        with pytest.raises(UserError, match=message) as caught:
            function(unused, **settings)
        assert "\n" not in str(caught.value)
