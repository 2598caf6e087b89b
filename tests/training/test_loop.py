import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from training import loop


def test_seeds_depend_on_every_part_and_not_on_the_global_generators():
    draws = {loop.seeded(s, *n).integers(2**60) for s in (0, 1) for n in (("a",), ("b",), ("a", 1))}
    assert len(draws) == 6
    np.random.seed(0)
    first = loop.seeded(3, "x").random(4)
    np.random.seed(1)
    assert np.array_equal(first, loop.seeded(3, "x").random(4))


@given(st.integers(1, 60), st.integers(1, 17), st.integers(1, 3), st.integers(0, 9))
def test_batches_visit_every_row_once_an_epoch(n_rows, size, epochs, seed):
    found = list(loop.batches(n_rows, size, epochs, seed))
    assert len(found) == loop.n_batches(n_rows, size, epochs)
    per_epoch = len(found) // epochs
    for epoch in range(epochs):
        rows = sum(found[epoch * per_epoch : (epoch + 1) * per_epoch], [])
        assert sorted(rows) == list(range(n_rows))
    assert found == list(loop.batches(n_rows, size, epochs, seed))


def test_an_epochs_order_does_not_depend_on_how_many_follow():
    one, two = list(loop.batches(50, 8, 1, 4)), list(loop.batches(50, 8, 2, 4))
    assert two[: len(one)] == one
    assert two[len(one) :] != one


@given(st.integers(1, 80), st.integers(1, 9), st.integers(1, 5), st.integers(0, 9))
def test_bucketing_keeps_rows_and_batch_sizes(n_rows, size, window, seed):
    lengths = loop.seeded(seed, "lengths").integers(1, 30, n_rows).tolist()
    orders = list(loop.batches(n_rows, size, 1, seed))
    found = list(loop.bucketed(orders, lengths, window))
    assert sorted(sum(found, [])) == list(range(n_rows))
    assert [len(batch) for batch in found] == [len(batch) for batch in orders]

    def padded(batches):
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)

    assert padded(found) <= padded(orders)


def test_a_window_of_one_changes_no_batch():
    orders = list(loop.batches(20, 6, 1, 0))
    found = loop.bucketed(orders, list(range(20)), 1)
    assert [sorted(batch) for batch in found] == [sorted(batch) for batch in orders]


def test_adamw_steps_as_its_equations_say():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    weight = model.weight.detach().double().numpy().copy()
    bias = model.bias.detach().double().numpy().copy()
    optimizer = loop.adamw(model, lr=0.1, weight_decay=0.5)
    x = torch.randn(5, 3)
    first = {"weight": 0.0, "bias": 0.0}
    second = {"weight": 0.0, "bias": 0.0}
    values = {"weight": weight, "bias": bias}
    for step in range(1, 4):
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        for name, decay in (("weight", 0.5), ("bias", 0.0)):
            grad = getattr(model, name).grad.double().numpy()
            # Loshchilov & Hutter 2019, algorithm 2
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            m, v = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            values[name] *= 1 - 0.1 * decay
            values[name] -= 0.1 * m / (np.sqrt(v) + 1e-8)
        optimizer.step()
    for name, expected in values.items():
        np.testing.assert_allclose(getattr(model, name).detach().numpy(), expected, rtol=1e-5)


def rates(schedule, optimizer, steps):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_learning_rate_warms_up_and_stays():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    found = rates(loop.warmup_constant(optimizer, 3), optimizer, 6)
    assert found == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_the_trapezoid_falls_to_nothing_at_the_end():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    found = rates(loop.trapezoid(optimizer, 1, 10, 0.4), optimizer, 11)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_without_cooldown_the_trapezoid_is_the_constant_schedule():
    first = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    second = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    constant = rates(loop.warmup_constant(first, 2), first, 6)
    assert rates(loop.trapezoid(second, 2, 6, 0.0), second, 6) == constant


def test_clipping_gives_the_norm_before():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert loop.clip_gradients([parameter], 1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), atol=1e-5, rtol=0)
