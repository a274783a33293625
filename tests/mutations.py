"""How files are damaged in tests: bits flipped, bytes cut out, bytes put in."""

from hypothesis import strategies as st


@st.composite
def mutations(draw: st.DrawFn, file: bytes, most: int = 3) -> bytes:
    """The file after one to `most` small damages."""
    mutated = bytearray(file)
    for _ in range(draw(st.integers(1, most))):
        position = draw(st.integers(0, max(0, len(mutated) - 1)))
        match draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip" if mutated:
                mutated[position] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del mutated[position : position + draw(st.integers(1, 40))]
            case _:
                mutated[position:position] = draw(st.binary(min_size=1, max_size=8))
    return bytes(mutated)
