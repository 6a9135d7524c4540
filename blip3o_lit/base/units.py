"""Numbers as people read them."""


def human_time(seconds: float) -> str:
    """Return a duration in two units at most, for example `2h10m` or `42ms`."""
    if 0.0005 <= seconds < 0.0995:
        return f"{1000 * seconds:.0f}ms"
    minutes, second = divmod(int(round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02d}h"
    if hours:
        return f"{hours}h{minute:02d}m"
    return f"{minute}m{second:02d}s" if minutes else f"{seconds:.1f}s"


def human_count(value: float) -> str:
    """Return a count with a decimal unit, for example `11.2k`."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.1f}{unit}"
    return f"{value:.0f}"


def gib(size: float) -> str:
    """Return bytes with a binary unit."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
