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
def test_the_best_of_all_choices_is_better_by_no_more_than_the_bytes_left_at_the_first_that_does_not_fit(values, spare):
    options = {
        f"layer{i}": (Option(4, size, before), Option(8, 2 * size, after))
        for i, (before, after, size) in enumerate(values)
    }
    bits = choose_bits(options, spare)
    assert spent(options, bits) <= spare
    assert all(cheap.error > dear.error for name, (cheap, dear) in options.items() if bits[name] == 8)
    choices = [dict(zip(options, choice, strict=True)) for choice in product((4, 8), repeat=len(options))]
    best = min(left(options, choice) for choice in choices if spent(options, choice) <= spare)
    rates = {name: (cheap.error - dear.error) / cheap.bytes for name, (cheap, dear) in options.items()}
    room, lost = spare, 0.0
    for name in sorted((n for n in options if rates[n] > 0), key=rates.__getitem__, reverse=True):
        if bits[name] == 4:
            lost = rates[name] * room
            assert room < options[name][0].bytes  # it did not fit
            break
        room -= options[name][0].bytes
    assert best - 1e-9 <= left(options, bits) <= best + lost + 1e-9


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.integers(0, 8))
def test_layers_of_equal_size_are_chosen_by_what_they_save(errors, count):
    options = {f"layer{i}": (Option(4, 5, e), Option(8, 10, 0.0)) for i, e in enumerate(errors)}
    bits = choose_bits(options, 5 * count)
    best = sum(sorted(errors)[: max(0, len(errors) - count)])
    assert abs(left(options, bits) - best) < 1e-9
