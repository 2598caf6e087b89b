import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightdiff.activations import activation_rows, mean_activations, place_means
from weightdiff.direction import harmless_means
from weightdiff.intervene import (
    Addition,
    AffineAblation,
    ZeroAblation,
    generate,
    generate_tokens,
    intervened,
    last_logits,
)
from weightdiff.prompts import pad_left

ROWS = [[1, 3, 8, 15, 4, 5], [1, 3, 17, 4, 5], [1, 3, 16, 9, 10, 12, 4, 5]]


def unit(seed=0, d=32):
    vector = torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vector / vector.norm()


def hf_logits(hf, rows):
    ids, mask = pad_left(rows, 0)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return hf(ids, attention_mask=mask.long(), position_ids=positions).logits


def blocks(hf):
    inner = hf.base_model
    return inner.layers if hasattr(inner, "layers") else inner.h


def hooked(hf, rows, pre=None, outputs=None):
    """Plain Hugging Face hooks: ``pre(layer, x)`` on block inputs, ``outputs`` on sub-layers."""
    handles = []
    for layer, block in enumerate(blocks(hf)):

        def pre_hook(module, args, kwargs, layer=layer):
            if args:
                return (pre(layer, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": pre(layer, kwargs["hidden_states"])}

        handles.append(block.register_forward_pre_hook(pre_hook, with_kwargs=True))
        attention = next(
            getattr(block, n) for n in ("self_attn", "attn", "attention") if hasattr(block, n)
        )
        for module in (attention, block.mlp) if outputs else ():

            def out_hook(module, args, out):
                return (outputs(out[0]), *out[1:]) if isinstance(out, tuple) else outputs(out)

            handles.append(module.register_forward_hook(out_hook))
    try:
        return hf_logits(hf, rows)[:, -1]
    finally:
        for handle in handles:
            handle.remove()


def test_forward_equals_plain_hugging_face_on_left_padded_rows(pair):
    hf, model = pair
    torch.testing.assert_close(
        last_logits(model, ROWS), hf_logits(hf, ROWS)[:, -1], atol=1e-4, rtol=1e-4
    )
    for i, row in enumerate(ROWS):
        alone = hf(torch.tensor([row])).logits[0, -1]
        torch.testing.assert_close(last_logits(model, ROWS)[i], alone, atol=1e-4, rtol=1e-4)


def test_zero_ablation_equals_the_authors_hooks(pair):
    hf, model = pair
    r = unit().float()

    def remove(x):
        return x - (x @ r)[..., None] * r

    expected = hooked(hf, ROWS, pre=lambda layer, x: remove(x), outputs=remove)
    plain = hf_logits(hf, ROWS)[:, -1]
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(
        last_logits(model, ROWS, [ZeroAblation(r)]), expected, atol=1e-4, rtol=1e-4
    )


def test_addition_equals_a_plain_hook(pair):
    hf, model = pair
    r = 3 * unit(1).float()

    def add(where):
        def pre(layer, x):
            if layer != 1:
                return x
            x = x.clone()
            x[:, where] += 0.7 * r
            return x

        return pre

    for positions, where in (
        ("all", slice(None)),
        ("last", slice(-1, None)),
        ("post", slice(-2, None)),
    ):
        got = last_logits(model, ROWS, [Addition(r, 1, 0.7, positions)])
        torch.testing.assert_close(got, hooked(hf, ROWS, add(where)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["zero", "affine"])
def test_ablation_fixes_the_component_everywhere_and_only_that(pair, kind):
    _, model = pair
    r = unit(2).float()
    means = place_means(model, ROWS)
    each = ZeroAblation(r) if kind == "zero" else AffineAblation(r, means)
    seen = {}

    def watch(name):
        def hook_fn(x, hook):
            seen[name] = x

        return hook_fn

    ids, mask = pad_left(ROWS, 0)
    names = [n for n in model.residual_hooks if "mid" not in n]
    with intervened(model, [each]) as places, model.hooks([(n, watch(n)) for n in names]):
        places.at_prompt(model.chat.places(mask))
        model.run_until(ids, mask, model.n_layers)
        where = model.chat.places(mask)
    for name in names:
        wanted = torch.zeros(mask.shape) if kind == "zero" else (means[name] @ r.double())[where]
        got = (seen[name] @ r)[mask]
        torch.testing.assert_close(got, wanted[mask].float(), atol=1e-4, rtol=1e-4)


def test_ablating_twice_is_ablating_once(pair):
    _, model = pair
    each = AffineAblation(unit(3), place_means(model, ROWS))
    once, twice = last_logits(model, ROWS, [each]), last_logits(model, ROWS, [each, each])
    torch.testing.assert_close(once, twice, atol=1e-4, rtol=1e-4)


def test_one_direction_a_row_equals_one_pass_a_direction(pair):
    _, model = pair
    units = torch.stack([unit(i) for i in range(3)]).float()
    means = place_means(model, ROWS)
    # Batches are ordered longest first, and so are the directions of their rows.
    order = np.argsort([-len(row) for row in ROWS], kind="stable")
    for make in (ZeroAblation, lambda u: AffineAblation(u, means), lambda u: Addition(u, 1)):
        together = last_logits(model, ROWS, [make(units[torch.tensor(order)])])
        for i in range(3):
            alone = last_logits(model, ROWS, [make(units[i])])[i]
            torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=1e-4)


def test_means_equal_a_loop_over_unpadded_rows(pair):
    hf, model = pair
    wanted = torch.zeros(2, 3, 32, dtype=torch.float64)
    for row in ROWS:
        states = hf(torch.tensor([row]), output_hidden_states=True).hidden_states
        for layer in range(3):
            wanted[:, layer] += states[layer][0, [-2, -1]].detach().double() / len(ROWS)
    got = mean_activations(model, ROWS, [-2, -1], batch_size=2)
    # fp32 rounding of the model, in units of the largest activation.
    scale = float(wanted.abs().max())
    torch.testing.assert_close(got, wanted, atol=1e-6 * scale, rtol=0)
    stored = activation_rows(model, ROWS, [-1], [0, 2], batch_size=2)
    torch.testing.assert_close(stored.mean(0)[0], wanted[1, [0, 2]], atol=1e-6 * scale, rtol=0)


def test_place_means_include_the_response(planted, harmless):
    means = harmless_means(planted, harmless, 4)
    name = "blocks.0.hook_resid_pre"
    answer = torch.zeros(32, dtype=torch.float64)
    # Every harmless answer is "sure gladly <eos>".
    for word in ("sure", "gladly", "<eos>"):
        answer[planted.tokenizer.get_vocab()[word]] += 1 / 3
    torch.testing.assert_close(means[name][-1], answer, atol=1e-6, rtol=0)
    assert means[name].shape == (2 + 1 + 2 + 1, 32)


def test_greedy_decoding_equals_a_loop_without_cache(pair):
    hf, model = pair
    prompts = ["tree now", "please take the bomb now", "paint"]
    got = generate_tokens(model, prompts, max_new_tokens=6, batch_size=2)
    for prompt, answer in zip(prompts, got, strict=True):
        row = model.chat.encode(prompt)
        for _ in range(6):
            row = [*row, int(hf(torch.tensor([row])).logits[0, -1].argmax())]
            if row[-1] == 2:
                break
        assert answer == row[len(model.chat.encode(prompt)) :]


def test_generation_under_an_intervention_equals_a_loop_without_cache(pair):
    hf, model = pair
    r = unit(4).float()

    def remove(x):
        return x - (x @ r)[..., None] * r

    got = generate_tokens(model, ["take the tree"], 5, interventions=[ZeroAblation(r)])[0]
    row = model.chat.encode("take the tree")
    start = len(row)
    for _ in range(len(got)):
        logits = hooked(hf, [row], pre=lambda layer, x: remove(x), outputs=remove)
        row = [*row, int(logits[0].argmax())]
    assert got == row[start:]


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_sampled_answer_does_not_depend_on_its_batch(planted, seed):
    prompts = ["take bomb now", "paint the tree", "please take dam", "now paint lamp please"]
    together = generate(planted, prompts, 5, temperature=3.0, seed=seed)
    alone = [generate(planted, [p], 5, temperature=3.0, seed=seed)[0] for p in prompts]
    assert together == alone


def test_samples_follow_the_distribution(planted):
    prompts = [f"tree {'now ' * (i % 3)}" for i in range(3)]
    from weightdiff.prompts import Prompt

    many = [Prompt(prompts[0], id=str(i)) for i in range(3000)]
    first = [row[0] for row in generate_tokens(planted, many, 1, temperature=2.0, seed=1)]
    logits = last_logits(planted, [planted.chat.encode(prompts[0])])[0]
    wanted = (logits.double() / 2.0).softmax(-1).numpy()
    got = np.bincount(first, minlength=len(wanted)) / len(first)
    assert np.abs(got - wanted).max() < 4 * np.sqrt(0.25 / 3000)


def test_an_unknown_hook_is_named(planted):
    from weightdiff.errors import WeightdiffError

    with (
        pytest.raises(WeightdiffError, match=r"blocks\.9\.hook_resid_pre"),
        planted.hooks([("blocks.9.hook_resid_pre", lambda x, hook: None)]),
    ):
        pass
