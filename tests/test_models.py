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

CACHING = [v2_bpe_rope, v3_alibi]  # the versions that keep keys and values


@torch.no_grad()
def logits_of(model, tokens):
    return model(torch.tensor([tokens]))[0][0]


def attend(model, x, start=0):
    """The first attention layer of a model on vectors x (B, T, C) at the positions from start on."""
    attention, end = model.blocks[0].attention, start + x.shape[1]
    if not hasattr(model, "positional_encoding"):  # v1 adds its positions to x
        return attention(x)
    encoding = model.positional_encoding(start, end)
    return attention(x, encoding[..., start:] if hasattr(model, "slopes") else encoding)  # no keys before start


# -- which tokens a prediction depends on --


def test_a_bigram_sees_only_the_last_token():
    model = tiny_model(v0_bigram)
    assert torch.equal(logits_of(model, [3, 1, 4, 1, 5])[-1], logits_of(model, [9, 2, 6, 5])[-1])
    assert not torch.equal(logits_of(model, [3, 1, 4])[-1], logits_of(model, [3, 1, 5])[-1])
    assert torch.equal(logits_of(model, [3, 7]), model.token_embedding.weight[[3, 7]])  # the rows of its table


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_a_transformer_sees_earlier_tokens(version):
    model = tiny_model(version)
    for other in ([9, 1, 4, 1, 5], [3, 1, 4, 9, 5]):  # the first token, and the one before the last
        change = logits_of(model, [3, 1, 4, 1, 5])[-1] - logits_of(model, other)[-1]
        assert change.abs().max() > 1e-3


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_no_later_token_changes_an_earlier_prediction(version):
    model = tiny_model(version)
    a, b = logits_of(model, [3, 1, 4, 1, 5, 9, 2, 6]), logits_of(model, [3, 1, 4, 1, 8, 7, 0, 0])
    assert torch.equal(a[:4], b[:4])  # to the bit
    assert not torch.equal(a[4], b[4])


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_the_rows_of_a_batch_do_not_see_each_other(version):
    model, rows = tiny_model(version), [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
    together = model(torch.tensor(rows))[0]
    assert together.shape == (2, 5, 50)
    for row, logits in zip(rows, together):
        torch.testing.assert_close(logits, logits_of(model, row), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_the_loss_is_the_mean_of_minus_log_probability(version):
    model = tiny_model(version)
    idx, targets = torch.randint(50, (3, 5)), torch.randint(50, (3, 5))
    logits, loss = model(idx, targets)
    probabilities = logits.detach().double().softmax(-1)
    nats = [-math.log(probabilities[b, t, targets[b, t]]) for b in range(3) for t in range(5)]
    assert loss.item() == pytest.approx(sum(nats) / 15, rel=1e-5)
    assert model(idx)[1] is None


# -- positions --


@torch.no_grad()
def test_only_positional_encodings_show_the_order_of_earlier_tokens():
    """Attention alone takes a weighted mean of a set. Each of the three positional encodings makes it see the order."""
    ordered, swapped = [3, 1, 4, 1, 5], [1, 4, 3, 1, 5]

    def difference(version):  # in what the last token collects in one layer of attention
        model = tiny_model(version)
        a, b = (attend(model, model.token_embedding(torch.tensor([tokens])))[0, -1] for tokens in (ordered, swapped))
        return (a - b).abs().max()

    assert difference(v1_transformer) < 1e-5
    assert difference(v2_bpe_rope) > 1e-3 and difference(v3_alibi) > 1e-3

    for depth in (1, 2):  # the whole of v1, with its position table and without
        model = tiny_model(v1_transformer, n_layer=depth)
        assert (logits_of(model, ordered)[-1] - logits_of(model, swapped)[-1]).abs().max() > 1e-3
    model = tiny_model(v1_transformer, n_layer=1)
    model.position_embedding.weight.zero_()
    assert torch.allclose(logits_of(model, ordered)[-1], logits_of(model, swapped)[-1], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("version", CACHING, ids=ids)
def test_rope_and_alibi_depend_on_distance_not_on_place(version):
    model = tiny_model(version)
    x = model.token_embedding(torch.tensor([[3, 1, 4, 1, 5]]))
    assert torch.allclose(attend(model, x, start=0), attend(model, x, start=100), atol=1e-4)


@torch.no_grad()
def test_learned_positions_depend_on_place():
    model = tiny_model(v1_transformer)
    assert (logits_of(model, [7, 7, 3, 1, 4])[-1] - logits_of(model, [3, 1, 4])[-1]).abs().max() > 1e-3
    x = model.token_embedding(torch.tensor([[3, 1, 4]]))
    early, late = (attend(model, x + model.position_embedding(torch.arange(s, s + 3))) for s in (0, 5))
    assert (early[0, -1] - late[0, -1]).abs().max() > 1e-3


def test_v1_refuses_more_tokens_than_it_has_positions_for():
    model = tiny_model(v1_transformer)
    assert logits_of(model, [1] * TINY["block_size"]).isfinite().all()
    with pytest.raises(v1_transformer.UserError, match="17 tokens are more than the 16"):
        logits_of(model, [1] * 17)


@pytest.mark.parametrize("version", [v0_bigram, *CACHING], ids=ids)
def test_the_others_accept_any_number_of_tokens(version):
    assert logits_of(tiny_model(version), [1] * 100).isfinite().all()


@pytest.mark.parametrize("start", [0, 3, 200])
def test_rope_rotates_pairs_of_channels(start):
    """Against Python's own complex numbers, one by one: at position t, the angle of channels 2j and 2j + 1 is
    t * 10000^(-2j/D)."""
    model = tiny_model(v2_bpe_rope)  # D = 32 / 2
    B, H, T, D = 2, 2, 5, 16
    x = torch.randn(B, H, T, D)
    rotated = v2_bpe_rope.rotate(x, model.positional_encoding(start, start + T))
    assert rotated.shape == x.shape and rotated.dtype == torch.float32
    for t in range(T):
        for j in range(D // 2):
            expected = complex(*x[1, 1, t, 2 * j:2 * j + 2]) * cmath.exp(1j * (start + t) * 10000 ** (-2 * j / D))
            assert cmath.isclose(complex(*rotated[1, 1, t, 2 * j:2 * j + 2]), expected, abs_tol=1e-4)
    assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), atol=1e-5)


def test_alibi_slopes_are_those_of_the_paper():
    """Press et al. 2022, section 3: 1/2 ... 1/2^8 for 8 heads, 1/2^0.5, 1/2, 1/2^1.5 ... 1/2^8 for 16 heads; for a
    number that is no power of two, those of the power below and then every second one of the power above."""
    slopes = v3_alibi.alibi_slopes
    assert slopes(8) == [1 / 2**k for k in range(1, 9)]
    assert slopes(16) == pytest.approx([2 ** (-k / 2) for k in range(1, 17)])
    assert slopes(12) == pytest.approx([2**-k for k in range(1, 9)] + [2 ** (-k / 2) for k in (1, 3, 5, 7)])
    assert slopes(1) == [1 / 256]
    assert slopes(3) == [1 / 16, 1 / 256, 1 / 4]


def test_the_attention_bias_of_alibi_is_minus_slope_times_distance():
    model = tiny_model(v3_alibi)
    bias = model.positional_encoding(0, 4)[0]  # (H, T, S), slopes 1/16 and 1/256
    inf = math.inf
    expected = torch.tensor([[0, -inf, -inf, -inf], [-1, 0, -inf, -inf], [-2, -1, 0, -inf], [-3, -2, -1, 0]])
    assert torch.equal(bias[0], expected / 16) and torch.equal(bias[1], expected / 256)
    assert torch.equal(model.positional_encoding(3, 4)[0], bias[:, 3:])  # one new token, three in the cache


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
                score = q[t, h] @ k[s, h]
                if version is v2_bpe_rope:  # the real part of conj(q e^(i t f)) k e^(i s f)
                    rotation = model.positional_encoding(t, t + 1)[0].conj() * model.positional_encoding(s, s + 1)[0]
                    a, b = (torch.view_as_complex(vector[h].view(-1, 2)) for vector in (q[t], k[s]))
                    score = (a.conj() * b * rotation).real.sum()
                bias = -v3_alibi.alibi_slopes(heads)[h] * (t - s) if version is v3_alibi else 0
                scores.append(score / math.sqrt(D) + bias)
            weights = torch.stack(scores).softmax(0)
            mean[t, h] = sum(weight * v[s, h] for s, weight in enumerate(weights))
    expected = mean.flatten(1) @ attention.projection.weight.double().T
    assert torch.allclose(attend(model, x)[0].double(), expected, atol=1e-4)


@torch.no_grad()
def test_the_fused_attention_is_v1s_attention(monkeypatch):
    """Without what tells positions (in v2 the rotation, in v3 the slopes), all three compute the same from the same
    weights: the lines that v1 writes out are what F.scaled_dot_product_attention does."""
    v1, v2, v3 = (tiny_model(version) for version in TRANSFORMERS)
    layers = [model.blocks[0].attention for model in (v1, v2, v3)]
    for layer in layers:
        layer.load_state_dict(layers[0].state_dict())
        layer.keep_weights = True
    x = torch.randn(2, 9, 32)
    expected = layers[0](x)

    def agrees(layer, encoding):
        y = layer(x, encoding)
        return torch.allclose(y, expected, atol=1e-5) and torch.allclose(layer.weights, layers[0].weights, atol=1e-5)

    assert agrees(layers[1], v2.positional_encoding(0, 1).expand(9, -1))  # everything at position 0
    assert not agrees(layers[1], v2.positional_encoding(0, 9))
    monkeypatch.setattr(v2_bpe_rope, "rotate", lambda x, rotation: x)
    assert agrees(layers[1], v2.positional_encoding(0, 9))
    assert not agrees(layers[2], v3.positional_encoding(0, 9))
    v3.slopes.zero_()
    assert agrees(layers[2], v3.positional_encoding(0, 9))


@torch.no_grad()
@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_feed_forward_uses_relu_then_gelu(version):
    """ReLU max(x, 0); GELU x * P(a standard normal number < x), Hendrycks and Gimpel 2016."""
    layer = tiny_model(version).blocks[0].feed_forward
    x = torch.randn(3, 5, 32)
    hidden = x @ layer.up.weight.T
    assert hidden.shape == (3, 5, 128)
    gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    active = hidden.clamp(min=0) if version is v1_transformer else gelu
    assert torch.allclose(layer(x), active @ layer.projection.weight.T, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_the_model_is_a_stack_of_pre_layernorm_blocks_with_residuals(version):
    model, idx = tiny_model(version), torch.tensor([[3, 1, 4, 1, 5]])

    def normalize(x, norm):
        return F.layer_norm(x, (32,)) * norm.weight

    encoding = () if version is v1_transformer else (model.positional_encoding(0, 5),)
    x = model.token_embedding.weight[idx]
    if version is v1_transformer:
        x = x + model.position_embedding.weight[:5]
    for block in model.blocks:
        x = x + block.attention(normalize(x, block.norm_1), *encoding)
        x = x + block.feed_forward(normalize(x, block.norm_2))
    expected = normalize(x, model.norm) @ model.token_embedding.weight.T  # weight tying
    assert torch.allclose(model(idx)[0], expected, atol=1e-3)


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_dropout_acts_on_the_embedding_and_on_what_each_layer_adds(version):
    """In training mode these are zero as often as the setting says, and scaled so that their mean stays."""
    model, places = tiny_model(version, dropout=0.25).train(), []
    for dropout in (model.dropout, *(block.dropout for block in model.blocks)):
        dropout.register_forward_hook(lambda module, inputs, output: places.append((inputs[0], output)))
    idx = torch.randint(50, (64, 16))
    model(idx)
    assert len(places) == 1 + 2 * 2
    for before, after in places:
        kept = after != 0
        assert 0.73 < kept.float().mean() < 0.77
        assert torch.allclose(after[kept], before[kept] / 0.75, rtol=1e-4)
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


# -- parameters --


def shapes(version, vocab_size, **settings):
    return {name: tuple(p.shape) for name, p in tiny_model(version, vocab_size, **settings).named_parameters()}


def test_v1_to_v2_changes_only_the_position_table_and_the_vocabulary():
    v1, v2 = shapes(v1_transformer, 61), shapes(v2_bpe_rope, 300)
    assert v1.pop("position_embedding.weight") == (16, 32)
    assert v1.pop("token_embedding.weight") == (61, 32)
    assert v2.pop("token_embedding.weight") == (300, 32)
    assert v1 == v2


def test_v2_and_v3_have_the_same_weights():
    v2, v3 = tiny_model(v2_bpe_rope, seed=1), tiny_model(v3_alibi, seed=2)
    assert shapes(v2_bpe_rope, 300) == shapes(v3_alibi, 300)
    state = v2.state_dict()
    v3.load_state_dict(state, strict=True)
    tiny_model(v2_bpe_rope, seed=3).load_state_dict(v3.state_dict(), strict=True)
    assert all(torch.equal(state[name], weight) for name, weight in v3.state_dict().items())
    assert state.keys() == dict(v2.named_parameters()).keys()  # no rotation or slope is saved


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_initialization_is_gpt2s(version):
    torch.manual_seed(0)
    model = version.LanguageModel(version.Config(), 500)
    for name, p in model.named_parameters():
        if p.dim() < 2:
            assert (p == 1).all(), name
        else:
            std = 1 / math.sqrt(128 * (2 * 4 if "projection" in name else 1))
            assert p.std().item() == pytest.approx(std, rel=0.05), name


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_before_training_all_tokens_are_about_equally_likely(version):
    """Logits that are all 0 have a loss of ln V. Random ones with variance 1 have ln V + 1/2."""
    torch.manual_seed(0)
    model = version.LanguageModel(tiny_config(version), 200)
    _, loss = model(torch.randint(200, (64, 16)), torch.randint(200, (64, 16)))
    assert loss.item() == pytest.approx(math.log(200) + (version is not v0_bigram) / 2, abs=1e-6 if version is v0_bigram else 0.1)


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_an_impossible_width_is_a_users_mistake(version):
    with pytest.raises(version.UserError, match="n-embd 30.*n-head 4"):
        version.LanguageModel(tiny_config(version, n_embd=30, n_head=4), 50)
    if version is v2_bpe_rope:
        with pytest.raises(version.UserError, match="even"):
            version.LanguageModel(tiny_config(version, n_embd=6, n_head=2), 50)


# -- the cache of keys and values --


@torch.no_grad()
@pytest.mark.parametrize("version", CACHING, ids=ids)
@pytest.mark.parametrize("first", [1, 5, 15, 16])
def test_reading_token_by_token_with_a_cache_is_reading_at_once(version, first):
    model = tiny_model(version)
    tokens, cache = torch.randint(50, (2, 16)), {}
    whole, parts = model(tokens)[0], [model(tokens[:, :first], cache=cache)[0]]
    for t in range(first, 16):
        parts.append(model(tokens[:, t:t + 1], cache=cache)[0])
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4)
    for block in model.blocks:
        assert [tuple(kept.shape) for kept in cache[block.attention]] == [(2, 2, 16, 16)] * 2  # k, v (B, H, S, D)


def test_v2_refuses_several_tokens_with_a_filled_cache():
    """Its fused call would let the first of them see only the first cached key."""
    model, cache = tiny_model(v2_bpe_rope), {}
    model(torch.tensor([[1, 2, 3]]), cache=cache)
    with pytest.raises(AssertionError, match="one token at a time"):
        model(torch.tensor([[4, 5]]), cache=cache)


@pytest.mark.parametrize("version", [v0_bigram, v1_transformer], ids=ids)
def test_v0_and_v1_leave_the_cache_empty(version):
    model, cache, calls = tiny_model(version), {}, []
    model(torch.tensor([[1, 2, 3]]), cache=cache)
    assert cache == {}
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["cache"]), with_kwargs=True)
    list(version.generate(model, [1, 2], 30))
    assert calls == [{}] * 30


# -- generation --


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS, ids=ids)
@pytest.mark.parametrize("block_size, length", [*((16, length) for length in (1, 7, 15, 16, 17, 40)), (5, 3), (1, 1)])
def test_generation_is_prediction_after_prediction(version, block_size, length):
    """Against a loop that always reads the whole context, token for token, also far past a full context: with the cache
    and without. At temperature 1 the tokens are many different ones, so that a wrong cache would show."""
    model = tiny_model(version, block_size=block_size)
    prompt = torch.randint(50, (length,)).tolist()
    generator, context, expected = torch.Generator().manual_seed(3), prompt[-block_size:], []
    for _ in range(40):
        if len(context) > block_size:
            context = context[-max(1, block_size // 2):]  # the newer half
        expected.append(version.sample_token(logits_of(model, context)[-1], generator))
        context.append(expected[-1])
    for use_cache in (True, False):
        assert list(version.generate(model, prompt, 40, seed=3, use_cache=use_cache)) == expected
    assert len(set(expected)) > 10
    greedy = [list(version.generate(model, prompt, 20, 0, use_cache=use_cache)) for use_cache in (True, False)]
    assert greedy[0] == greedy[1] and greedy[0][0] == logits_of(model, prompt[-block_size:])[-1].argmax()


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_generation_with_a_cache_reads_every_token_once(version):
    """Except when the context is full: then the newer half is read again, with an empty cache."""
    model, lengths = tiny_model(version), []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    list(version.generate(model, [1, 2, 3], 30))
    if version in CACHING:
        assert lengths == [3] + [1] * 13 + ([8] + [1] * 8) + ([8] + [1] * 6)
    else:
        assert lengths == [*range(3, 17), *range(8, 17), *range(8, 15)]


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_generation_changes_nothing_in_the_model(version):
    model, untouched = tiny_model(version, dropout=0.1), tiny_model(version, dropout=0.1)
    for m in (model, untouched):
        m(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))[1].backward()
    state = torch.get_rng_state()
    list(version.generate(model, [1, 2], 20))
    assert torch.equal(torch.get_rng_state(), state)
    for (name, p), q in zip(model.named_parameters(), untouched.parameters()):
        assert torch.equal(p, q) and torch.equal(p.grad, q.grad) and p.requires_grad and not p.is_inference(), name
        assert p.stride() == q.stride(), name
    assert model.state_dict().keys() == untouched.state_dict().keys()
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(model.modules(), untouched.modules()))


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_generation_runs_in_the_mode_that_it_finds(version):
    model = tiny_model(version, dropout=0.5)
    evaluating = list(version.generate(model, [1, 2], 20))
    assert not model.training
    torch.manual_seed(0)
    assert list(version.generate(model.train(), [1, 2], 20)) != evaluating  # dropout acts
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_generation_between_training_steps_changes_no_loss(version):
    """To the bit, with the optimizer that training uses: it depends on how weights lie in memory, too."""
    def losses(generate_at):
        model, tokens = tiny_model(version, dropout=0.1).train(), torch.arange(1000) % 50
        optimizer, losses = version.make_optimizer(model, {}), []
        strides = [p.stride() for p in model.parameters()]
        for step in range(6):
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.01
            _, loss = model(*version.get_batch(tokens, model.config, step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step in generate_at:
                assert len(list(version.generate(model, [1, 2, 3], 20))) == 20 and model.training
                assert [p.stride() for p in model.parameters()] == strides
        return losses

    undisturbed = losses(generate_at=())
    assert losses(generate_at=(1, 3)) == undisturbed and len(set(undisturbed)) == 6


# -- what a forward pass can show and how it can run --


@torch.no_grad()
@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_attention_weights_for_inspection_are_the_real_ones(version):
    """Rows sum to 1, no later position has weight, and weights times values is what attention passes on; for one new
    token with a filled cache, too."""
    model, collected = tiny_model(version), []
    tokens, cache = torch.randint(50, (3, 10)), {}
    logits, _ = model(tokens[:, :9])
    for block in model.blocks:
        assert not hasattr(block.attention, "weights")  # unless asked for, they are not kept
        block.attention.keep_weights = True
        block.attention.projection.register_forward_pre_hook(lambda module, inputs: collected.append(inputs[0]))
        block.attention.qkv.register_forward_hook(lambda module, inputs, output: collected.append(output))

    def check(T, S):
        for i, block in enumerate(model.blocks):
            weights, (qkv, y) = block.attention.weights, collected[2 * i:2 * i + 2]
            assert weights.shape == (3, 2, T, S) and weights.min() >= 0
            assert torch.equal(weights, weights.tril(S - T))
            torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, T))
            v = qkv[..., 64:].unflatten(2, (2, 16)).transpose(1, 2) if S == T else cache[block.attention][1]
            torch.testing.assert_close((weights @ v).transpose(1, 2).flatten(2), y, atol=1e-4, rtol=1e-4)
        collected.clear()

    assert torch.equal(model(tokens[:, :9], cache=cache)[0], logits)
    check(9, 9)
    if version in CACHING:
        model(tokens[:, 9:], cache=cache)
        check(1, 10)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("version", CACHING, ids=ids)
def test_torch_compile_takes_the_model_in_one_piece(version, bfloat16):
    """A graph break, where Python steps in between two compiled parts, would cost the speed that one compiles for."""
    model, idx = tiny_model(version, dropout=0.1).train(), torch.randint(50, (2, 16))
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        explanation = torch._dynamo.explain(model)(idx, idx)
    torch._dynamo.reset()
    assert (explanation.graph_break_count, explanation.graph_count) == (0, 1), explanation.break_reasons


@torch.no_grad()
@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_bfloat16_computes_nearly_the_same_loss(version):
    model, idx, targets = tiny_model(version), torch.randint(50, (8, 16)), torch.randint(50, (8, 16))
    exact = model(idx, targets)[1].item()
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(idx, targets)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.02) and loss.item() != exact
