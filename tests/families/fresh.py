"""Reload pruned folders where cfsp is not installed; run as a script, in a process of its own.

Arguments: folders, each in a line with its Auto class. For each, FOLDER.answer of torch: the class
that it reloads as, its logits and greedy tokens, or the error.
"""

import sys

import torch

TOKENS = torch.arange(24)[None] * 11 % 256
NEW_TOKENS = 4


class Refuse:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in ("cfsp", "cfsp_kernels"):
            raise ImportError("cfsp is not installed here")


@torch.no_grad()
def said(model: torch.nn.Module) -> dict[str, object]:
    """What a model makes of the same few tokens, here and there."""
    logits = model(input_ids=TOKENS, use_cache=False).logits
    generated = model.generate(
        TOKENS, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    return {"class": type(model).__name__, "logits": logits, "tokens": generated}


def main(*, again: bool = False) -> None:
    """``again``: save each once more, FOLDER-again, and say what that one answers too."""
    sys.meta_path.insert(0, Refuse())
    import transformers

    torch.set_num_threads(1)
    for folder, auto in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        try:
            kind = getattr(transformers, auto)
            options = {"trust_remote_code": True, "output_loading_info": True}
            model, info = kind.from_pretrained(folder, **options)
            if made_up := {what: sorted(keys) for what, keys in info.items() if keys}:
                raise ValueError(f"{made_up}")
            answer = said(model.eval())
            if again:
                model.save_pretrained(f"{folder}-again")
                torch.save(
                    said(kind.from_pretrained(f"{folder}-again", trust_remote_code=True).eval()),
                    f"{folder}-again.answer",
                )
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        torch.save(answer, f"{folder}.answer")


if __name__ == "__main__":
    main()
