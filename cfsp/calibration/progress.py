"""What the bars on stderr say beside their own counts and the time left."""

from tqdm import tqdm


class BlockProgress:
    """Keeps a bar's postfix at the block that has its turn and the speed of reading so far."""

    def __init__(self, bar: tqdm, blocks: int) -> None:
        self.bar = bar
        self.blocks = blocks
        self.bytes_read = 0

    def turn(self, number: int, stored_bytes: int) -> None:
        """A block's turn has come, whose reading took ``stored_bytes`` from disk."""
        self.bytes_read += stored_bytes
        elapsed = self.bar.format_dict["elapsed"]
        speed = ""
        if self.bytes_read and elapsed:
            speed = f", {self.bytes_read / elapsed / 1e9:.2f} GB/s read"
        self.bar.set_postfix_str(f"block {number + 1}/{self.blocks}{speed}")
