"""What each model can and cannot do: the ideas of the progression as differences of behaviour."""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F

import v0_bigram
import v1_transformer
import v2_bpe_rope
import v3_alibi
from tests.conftest import TINY, TRANSFORMERS, VERSIONS, ids, tiny_config, tiny_model

ROTARY_AND_ALIBI = [v2_bpe_rope, v3_alibi]


@torch.no_grad()
def logits_of(model, tokens):
    return model(torch.tensor([tokens]))[0][0]


# -- what the last score depends on --


def test_a_bigram_sees_the_last_token_alone():
    model = tiny_model(v0_bigram)
    assert torch.equal(logits_of(model, [3, 1, 4, 1, 5])[-1], logits_of(model, [9, 2, 6, 5])[-1])
    assert not torch.equal(logits_of(model, [3, 1, 4])[-1], logits_of(model, [3, 1, 5])[-1])


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_a_transformer_sees_earlier_tokens(version):
    model = tiny_model(version)
    change = logits_of(model, [3, 1, 4, 1, 5])[-1] - logits_of(model, [9, 1, 4, 1, 5])[-1]
    assert change.abs().max() > 1e-3


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_no_later_token_changes_an_earlier_score(version):
    model = tiny_model(version)
    one, other = [3, 1, 4, 1, 5, 9, 2, 6], [3, 1, 4, 1, 8, 7, 0, 0]
    for first in (True, False):
        a, b = logits_of(model, one), logits_of(model, other)
        assert torch.equal(a[:4], b[:4])  # to the bit
        assert not torch.equal(a[4], b[4])
        one, other = other, one


# -- positions --


def attended(version, tokens, start=0, heads=2):
    """What the last of some tokens gathers in a single layer of attention, where nothing else can tell positions."""
    model = tiny_model(version, n_head=heads)
    attention = model.blocks[0].attention
    x = model.token_embedding(torch.tensor([tokens]))
    if version is v1_transformer:
        return attention(x)[0, -1]
    end = start + len(tokens)
    positions = model.positions(start, end)
    if version is v3_alibi:  # only the keys that are there
        positions = positions[..., start:]
    return attention(x, positions)[0, -1]


@torch.no_grad()
def test_only_positions_tell_the_order_of_earlier_tokens():
    """One layer without positions takes a weighted mean of a set; each of the three position schemes sees the order."""
    ordered, swapped = [3, 1, 4, 1, 5], [1, 4, 3, 1, 5]
    assert torch.allclose(attended(v1_transformer, ordered), attended(v1_transformer, swapped), atol=1e-5)
    for version in ROTARY_AND_ALIBI:
        assert (attended(version, ordered) - attended(version, swapped)).abs().max() > 1e-3

    for depth in (1, 2):  # the whole of v1, with its position table and without
        model = tiny_model(v1_transformer, n_layer=depth)
        assert (logits_of(model, ordered)[-1] - logits_of(model, swapped)[-1]).abs().max() > 1e-3
    model = tiny_model(v1_transformer, n_layer=1)
    model.position_embedding.weight.zero_()
    assert torch.allclose(logits_of(model, ordered)[-1], logits_of(model, swapped)[-1], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("version", ROTARY_AND_ALIBI, ids=ids)
def test_scores_depend_on_distance_not_on_place(version):
    near, far = attended(version, [3, 1, 4, 1, 5], start=0), attended(version, [3, 1, 4, 1, 5], start=100)
    assert torch.allclose(near, far, atol=1e-4)


@torch.no_grad()
def test_learned_positions_depend_on_place():
    model = tiny_model(v1_transformer)
    assert (logits_of(model, [7, 7, 3, 1, 4])[-1] - logits_of(model, [3, 1, 4])[-1]).abs().max() > 1e-3
    x = model.token_embedding(torch.tensor([[3, 1, 4]]))
    early, late = (x + model.position_embedding(torch.arange(s, s + 3)) for s in (0, 5))
    attention = model.blocks[0].attention
    assert (attention(early)[0, -1] - attention(late)[0, -1]).abs().max() > 1e-3


def test_v1_refuses_more_context_than_it_has_positions_for():
    model = tiny_model(v1_transformer)
    assert model.max_context == TINY["block_size"]
    model(torch.zeros(1, 16, dtype=torch.long))
    with pytest.raises(v1_transformer.UserError, match="17 tokens are more than the 16"):
        model(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("version", [v0_bigram, *ROTARY_AND_ALIBI], ids=ids)
def test_the_others_accept_any_context(version):
    model = tiny_model(version)
    assert model.max_context == math.inf
    assert logits_of(model, [1] * 100).isfinite().all()


def test_rope_is_a_rotation_of_complex_numbers():
    """Against Python's own complex numbers, one by one: channels 2i and 2i + 1 turn by t * 10000^(-2i/D)."""
    B, H, T, D, start = 2, 2, 5, 16, 3
    x = torch.randn(B, H, T, D)
    model = tiny_model(v2_bpe_rope)  # D = 32 / 2
    rotated = v2_bpe_rope.rotate(x, model.positions(start, start + T))
    assert rotated.shape == x.shape
    for t in range(T):
        for i in range(D // 2):
            turn = cmath.exp(1j * (start + t) * 10000 ** (-2 * i / D))
            expected = complex(x[1, 1, t, 2 * i], x[1, 1, t, 2 * i + 1]) * turn
            assert cmath.isclose(complex(rotated[1, 1, t, 2 * i], rotated[1, 1, t, 2 * i + 1]), expected, abs_tol=1e-5)
    assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), atol=1e-5)


def test_alibi_slopes_are_those_of_the_paper():
    """Press et al. 2022, section 3: 1/2 ... 1/2^8 for 8 heads, 1/2^0.5, 1/2, 1/2^1.5 ... 1/2^8 for 16 heads; for a
    number that is no power of two, those of the power below and then every second one of the power above."""
    assert v3_alibi.alibi_slopes(8) == [1 / 2**k for k in range(1, 9)]
    assert v3_alibi.alibi_slopes(16) == pytest.approx([2 ** (-k / 2) for k in range(1, 17)])
    assert v3_alibi.alibi_slopes(12) == pytest.approx(
        [2**-k for k in range(1, 9)] + [2 ** (-k / 2) for k in (1, 3, 5, 7)]
    )
    assert v3_alibi.alibi_slopes(1) == [1 / 256]
    assert v3_alibi.alibi_slopes(3) == [1 / 16, 1 / 256, 1 / 4]


def test_alibi_positions_are_penalties_for_distance():
    model = tiny_model(v3_alibi)
    bias = model.positions(0, 4)[0]  # (H, T, S), slopes 1/16 and 1/256
    inf = math.inf
    expected = torch.tensor([[0, -inf, -inf, -inf], [-1, 0, -inf, -inf], [-2, -1, 0, -inf], [-3, -2, -1, 0]])
    assert torch.equal(bias[0], expected / 16) and torch.equal(bias[1], expected / 256)
    assert torch.equal(model.positions(3, 4)[0], bias[:, 3:])  # one new token, three that the cache holds


# -- the parts against plain loops and formulas --


@torch.no_grad()
@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_a_weighted_mean(version, heads):
    """Against two plain loops over heads and queries, in float64."""
    model = tiny_model(version, n_head=heads)
    attention, T, C, D = model.blocks[0].attention, 7, 32, 32 // heads
    x = torch.randn(1, T, C)
    q, k, v = (x[0].double() @ attention.qkv.weight.double().T).view(T, 3, heads, D).unbind(1)
    mean = torch.zeros(T, heads, D, dtype=torch.float64)
    for h in range(heads):
        for t in range(T):
            scores = []
            for s in range(t + 1):
                a, b = q[t, h], k[s, h]
                if version is v2_bpe_rope:
                    turn = model.positions(t, t + 1)[0].conj() * model.positions(s, s + 1)[0]
                    a, b = torch.view_as_complex(a.view(-1, 2)), torch.view_as_complex(b.view(-1, 2))
                    score = (a.conj() * b * turn).real.sum()
                else:
                    score = (a * b).sum()
                penalty = v3_alibi.alibi_slopes(heads)[h] * (t - s) if version is v3_alibi else 0
                scores.append(score / math.sqrt(D) - penalty)
            weights = torch.stack(scores).softmax(0)
            mean[t, h] = sum(weight * v[s, h] for s, weight in enumerate(weights))
    expected = mean.flatten(1) @ attention.projection.weight.double().T
    result = attention(x) if version is v1_transformer else attention(x, model.positions(0, T))
    assert torch.allclose(result[0].double(), expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_feed_forward_bends_with_relu_then_gelu(version):
    """ReLU max(x, 0); GELU x * P(a standard normal number < x), Hendrycks and Gimpel 2016."""
    layer = tiny_model(version).blocks[0].feed_forward
    x = torch.randn(3, 5, 32)
    wide = x @ layer.up.weight.T
    assert wide.shape == (3, 5, 128)
    bent = wide.clamp(min=0) if version is v1_transformer else wide * (1 + torch.erf(wide / math.sqrt(2))) / 2
    assert torch.allclose(layer(x), bent @ layer.projection.weight.T, atol=1e-4)


@torch.no_grad()
def test_a_block_is_pre_layernorm_with_residuals():
    model = tiny_model(v1_transformer)
    block, x = model.blocks[0], torch.randn(2, 5, 32)
    normal = lambda x, norm: F.layer_norm(x, (32,)) * norm.weight  # noqa: E731
    y = x + block.attention(normal(x, block.norm_1))
    assert torch.allclose(block(x), y + block.feed_forward(normal(y, block.norm_2)), atol=1e-4)


# -- parameters --


def shapes(version, vocab_size, **settings):
    return {name: tuple(p.shape) for name, p in tiny_model(version, vocab_size, **settings).named_parameters()}


def test_v1_to_v2_changes_the_position_table_and_the_vocabulary_alone():
    v1, v2 = shapes(v1_transformer, 61), shapes(v2_bpe_rope, 300)
    assert v1.pop("position_embedding.weight") == (16, 32)
    assert v1.pop("token_embedding.weight") == (61, 32)
    assert v2.pop("token_embedding.weight") == (300, 32)
    assert v1 == v2


def test_v2_and_v3_fit_each_other():
    v2, v3 = tiny_model(v2_bpe_rope, seed=1), tiny_model(v3_alibi, seed=2)
    assert shapes(v2_bpe_rope, 300) == shapes(v3_alibi, 300)
    state = v2.state_dict()
    v3.load_state_dict(state, strict=True)
    tiny_model(v2_bpe_rope, seed=3).load_state_dict(v3.state_dict(), strict=True)
    assert all(torch.equal(state[name], weight) for name, weight in v3.state_dict().items())


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_initialisation_is_gpt2s(version):
    torch.manual_seed(0)
    model = version.LanguageModel(version.Config(), 500)
    for name, p in model.named_parameters():
        if p.dim() < 2:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * model.config.n_layer) if "projection" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_the_loss_at_the_start_is_that_of_guessing(version):
    torch.manual_seed(0)
    model = version.LanguageModel(tiny_config(version), 200)
    idx = torch.randint(200, (8, 16))
    _, loss = model(idx, torch.randint(200, (8, 16)))
    assert loss.item() == pytest.approx(math.log(200), rel=0.05)


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_an_impossible_width_is_a_users_mistake(version):
    with pytest.raises(version.UserError, match="n-embd 30.*n-head 4"):
        version.LanguageModel(tiny_config(version, n_embd=30, n_head=4), 50)
    if version is v2_bpe_rope:
        with pytest.raises(version.UserError, match="even"):
            version.LanguageModel(tiny_config(version, n_embd=6, n_head=2), 50)


# -- the cache of keys and values --


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS, ids=ids)
@pytest.mark.parametrize("pieces", [(1,) * 16, (5, 1, 1, 9), (16,), (3, 13)])
def test_reading_in_pieces_with_a_cache_is_reading_at_once(version, pieces):
    model = tiny_model(version)
    tokens = torch.randint(50, (2, 16))
    whole, cache, parts = model(tokens)[0], {}, []
    for piece in tokens.split(pieces, dim=1):
        parts.append(model(piece, cache=cache)[0])
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
@pytest.mark.parametrize("length", [1, 7, 15, 16, 17, 40])
def test_generation_with_and_without_the_cache_agrees(version, length):
    """Token for token, also far past a full context."""
    model = tiny_model(version)
    prompt = torch.randint(50, (length,)).tolist()
    for temperature in (0, 1):  # at 1, so that the tokens differ among themselves and a wrong cache would show
        cached, plain = (
            list(version.generate(model, prompt, 60, temperature, seed=3, use_cache=use_cache))
            for use_cache in (True, False)
        )
        assert cached == plain and len(cached) == 60
    assert len(set(cached)) > 10


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_a_model_that_has_written_is_what_it_was(version):
    """Generation may lay the weights out otherwise in memory, but they stay the same numbers, and can be trained."""
    model, untouched = tiny_model(version), tiny_model(version)
    list(version.generate(model, [1, 2], 5))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), untouched.state_dict().values()))
    tokens = torch.randint(50, (3, 16))
    losses = []
    for m in (model, untouched):
        m.train()
        _, loss = m(tokens, tokens)
        loss.backward()
        torch.optim.AdamW(m.parameters(), lr=0.1, fused=True).step()
        losses.append(m(tokens, tokens)[1])
    torch.testing.assert_close(*losses)


# -- a look inside --


@torch.no_grad()
@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_attention_weights_are_the_real_ones(version):
    """Rows sum to 1, nothing looks ahead, and weights times values is what the attention itself gathers."""
    model = tiny_model(version)
    cache, outputs = {"weights": []}, []
    for block in model.blocks:
        block.attention.projection.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    tokens = torch.randint(50, (3, 9))
    logits, _ = model(tokens, cache=cache)
    assert torch.equal(logits, model(tokens)[0])
    assert len(cache["weights"]) == 2
    for block, weights, output in zip(model.blocks, cache["weights"], outputs):
        assert weights.shape == (3, 2, 9, 9)
        assert torch.allclose(weights.sum(-1), torch.ones(3, 2, 9), atol=1e-5)
        assert torch.equal(weights, weights.tril()) and weights.min() >= 0
        k, v = cache[block.attention]
        assert torch.allclose((weights @ v).transpose(1, 2).flatten(2), output, atol=1e-4)
    model(tokens[:, :1], cache=cache)  # one more token looks at all ten
    assert cache["weights"][-1].shape == (3, 2, 1, 10)
