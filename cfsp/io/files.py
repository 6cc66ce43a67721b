"""Small things about files that every room needs."""


def format_bytes(count: float) -> str:
    """21474836480 -> "20.0 GiB"."""
    power = min(4, max(0, int(count).bit_length() - 1) // 10)
    return f"{count / 1024**power:.{int(power > 0)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
