"""The choice of bits against trying every subset."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from cachequant.quant.allocation import Option, choose_bits

ERRORS = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10), st.integers(1, 50)), min_size=1, max_size=7)


def spent(options, bits):
    return sum(pair[bits[name] == 8].bytes - pair[0].bytes for name, pair in options.items())


def left(options, bits):
    return sum(pair[bits[name] == 8].error for name, pair in options.items())


@given(ERRORS, st.floats(0, 200))
def test_no_choice_of_as_many_bytes_has_less_error_up_to_the_first_that_does_not_fit(values, spare):
    options = {
        f"layer{i}": (Option(4, size, before), Option(8, 2 * size, after))
        for i, (before, after, size) in enumerate(values)
    }
    bits = choose_bits(options, spare)
    used = spent(options, bits)
    assert used <= spare
    for choice in product((4, 8), repeat=len(options)):
        other = dict(zip(options, choice, strict=True))
        rate = max(
            ((c.error - d.error) / (d.bytes - c.bytes) for n, (c, d) in options.items() if bits[n] == 4), default=0.0
        )
        if spent(options, other) <= used:  # Lagrange: what another saves is at most what the skipped ones would
            assert left(options, other) >= left(options, bits) - max(rate, 0.0) * used - 1e-9
    assert all(pair[0].error > pair[1].error for name, pair in options.items() if bits[name] == 8)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.integers(0, 8))
def test_layers_of_equal_size_are_chosen_by_what_they_save(errors, count):
    options = {f"layer{i}": (Option(4, 5, e), Option(8, 10, 0.0)) for i, e in enumerate(errors)}
    bits = choose_bits(options, 5 * count)
    best = sum(sorted(errors)[: max(0, len(errors) - count)])
    assert abs(left(options, bits) - best) < 1e-9
