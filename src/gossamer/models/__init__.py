"""Language models: found, opened, walked block by block, saved and run; and the texts that they read."""

from gossamer.models.checkpoint import load_checkpoint
from gossamer.models.checkpoint_writer import CheckpointWriter
from gossamer.models.contents import open_checkpoint
from gossamer.models.generate import Token, generate
from gossamer.models.manifest import is_checkpoint
from gossamer.models.parts import read_part, write_part
from gossamer.models.sampling import Sampling
from gossamer.models.session import (
    DecodingSession,
    PrefixSession,
    ScoringSession,
    Session,
    SessionFactory,
    context_length,
)
from gossamer.models.skeleton import (
    WeightFiles,
    empty_model,
    load_model,
    materialize,
    read_parameter,
    release,
    skeleton,
)
from gossamer.models.sources import ModelFolder, resolve
from gossamer.models.text import (
    Exchange,
    Text,
    TextSource,
    calibration_windows,
    default_text,
    evaluation_windows,
    read_text,
)
from gossamer.models.tokenizer import StreamDecoder, encode_prompt, encode_turns, load_tokenizer
from gossamer.models.walk import (
    Block,
    BlockInputs,
    ModelParts,
    capture_block_inputs,
    find_parts,
    finish,
    prunable,
    run_block,
    set_weight,
    weight_of,
)

__all__ = [
    "Block",
    "BlockInputs",
    "CheckpointWriter",
    "DecodingSession",
    "Exchange",
    "ModelFolder",
    "ModelParts",
    "PrefixSession",
    "Sampling",
    "ScoringSession",
    "Session",
    "SessionFactory",
    "StreamDecoder",
    "Text",
    "TextSource",
    "Token",
    "WeightFiles",
    "calibration_windows",
    "capture_block_inputs",
    "context_length",
    "default_text",
    "empty_model",
    "encode_prompt",
    "encode_turns",
    "evaluation_windows",
    "find_parts",
    "finish",
    "generate",
    "is_checkpoint",
    "load_checkpoint",
    "load_model",
    "load_tokenizer",
    "materialize",
    "open_checkpoint",
    "prunable",
    "read_parameter",
    "read_part",
    "read_text",
    "release",
    "resolve",
    "run_block",
    "set_weight",
    "skeleton",
    "weight_of",
    "write_part",
]
