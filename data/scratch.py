"""An untrained chat model in the form of a checkpoint of the hub, to try every step of a run without one.

    python -m data.scratch OUT --text prompts.jsonl --vocab 8192 --hidden 512 --layers 8

writes a model of the Qwen3 architecture with random weights. Its byte-level BPE tokenizer is trained on the
prompts and solutions of prompt files (data/prompts.py), and has Qwen's special tokens and a ChatML template
with a switch for thinking; its head has more rows than the tokenizer has ids (--pad_vocab). --tokenizer takes
the tokenizer of another checkpoint instead.
"""
import argparse
from pathlib import Path

from config import Refused

from .prompts import load_prompts

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not "
          "enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def tokenizer(texts, vocab):
    """Return a byte-level BPE with at most `vocab` ids, Qwen's special tokens and CHATML.

    Any text that is encoded and decoded comes back unchanged.
    """
    # models.py has to be imported before transformers, which would take our kernels/ for a package of PyPI.
    import text  # noqa: F401
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=CHATML)


def model(tok, seed, hidden, layers, pad_vocab=0, positions=2048):
    """Return a Qwen3 with random weights whose head has `pad_vocab` rows more than `tok` has ids."""
    import text  # noqa: F401     # first, as in `tokenizer`
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    heads, stops = max(hidden // 64, 1), [tok.eos_token_id, tok.pad_token_id]
    net = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tok) + pad_vocab, hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=heads, head_dim=hidden // heads,
        num_key_value_heads=heads if heads % 2 else heads // 2, max_position_embeddings=positions,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=stops[0], pad_token_id=stops[1]))
    net.generation_config.update(eos_token_id=stops, do_sample=True, top_k=20, top_p=0.95, temperature=0.6)
    return net


def write_sized(folder, shape, ids, seed, rows=None, dtype=None):
    """Write a Qwen3 of a real model's shape with random weights, and a tokenizer of `ids` ids.

    shape: arguments of Qwen3Config. rows: of the head, at least `ids`.
    """
    import text  # noqa: F401     # first, as in `tokenizer`
    import tokenizers
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    known = [*SPECIAL, *map(chr, range(32, 127)), "\n"]
    words = known + [f"token{i}" for i in range(ids - len(known))]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)},
                                                            unk_token=" "))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                  chat_template=CHATML)
    torch.manual_seed(seed)
    Qwen3ForCausalLM(Qwen3Config(
        **shape, vocab_size=rows or ids, tie_word_embeddings=True, eos_token_id=tok.eos_token_id,
        bos_token_id=None, pad_token_id=tok.pad_token_id, max_position_embeddings=4096,
    )).to(dtype or torch.float32).save_pretrained(folder)
    tok.save_pretrained(folder)


def texts(path):
    """Yield the prompts and solutions of a prompt file."""
    from text import messages         # here, as in `tokenizer`

    for row in load_prompts(path, "text"):
        yield from (message["content"] for message in messages(row["prompt"]))
        yield row.get("solution") or ""


def main(argv=None):
    """Write a model and its tokenizer from the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--text", nargs="+", default=[], help="prompt files to train the tokenizer on")
    parser.add_argument("--tokenizer", help="a checkpoint whose tokenizer to take instead")
    parser.add_argument("--vocab", type=int, default=8192, help="token ids")
    parser.add_argument("--pad_vocab", type=int, default=64, help="rows of the head beyond the token ids")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if Path(args.out).exists():
        parser.error(f"{args.out} exists; choose another folder")
    if not args.tokenizer and not args.text:
        parser.error("give --text, or the --tokenizer of a checkpoint")
    if args.hidden < 64 or args.hidden % 64:
        parser.error("--hidden is not a multiple of 64")
    if min(args.layers, args.vocab, args.pad_vocab + 1) < 1:
        parser.error("--layers and --vocab must be at least 1, --pad_vocab at least 0")
    if args.tokenizer:
        import text  # noqa: F401     # first, as in `tokenizer`
        from transformers import AutoTokenizer
        tok = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
    else:
        try:
            tok = tokenizer([text for path in args.text for text in texts(path)], args.vocab)
        except Refused as error:                        # a prompt file that cannot be used
            parser.error(str(error))
    tok.save_pretrained(args.out)
    model(tok, args.seed, args.hidden, args.layers, args.pad_vocab).save_pretrained(args.out)


if __name__ == "__main__":
    main()
