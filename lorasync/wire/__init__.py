"""What the trainer and the vLLM worker must agree on: messages, answers, the manifest, tensors as bytes.

Messages and answers are plain dicts of strings, numbers and lists: they pass every route that vLLM offers, and pickle is
never needed. Bytes ride beside a message, or travel by a transport that the message names.
"""

from lorasync.wire.answers import Answer, Introduction, answer_from_dict, error_as_dict, error_from_dict
from lorasync.wire.manifest import Entry, manifest_as_text, manifest_from_text
from lorasync.wire.messages import (
    ADAPTER_IDS,
    PROBE,
    PROTOCOL,
    Abort,
    BucketMessage,
    Collect,
    Commit,
    Digest,
    Goodbye,
    Hello,
    Message,
    Rollback,
    Status,
    message_from_dict,
)
from lorasync.wire.tensors import (
    Tensors,
    as_bytes,
    digest,
    digest_of_parts,
    digest_of_text,
    dtype_name,
    dtype_of,
    nbytes,
    pack,
    unpack,
)

__all__ = [
    "ADAPTER_IDS",
    "PROBE",
    "PROTOCOL",
    "Abort",
    "Answer",
    "BucketMessage",
    "Collect",
    "Commit",
    "Digest",
    "Entry",
    "Goodbye",
    "Hello",
    "Introduction",
    "Message",
    "Rollback",
    "Status",
    "Tensors",
    "answer_from_dict",
    "as_bytes",
    "digest",
    "digest_of_parts",
    "digest_of_text",
    "dtype_name",
    "dtype_of",
    "error_as_dict",
    "error_from_dict",
    "manifest_as_text",
    "manifest_from_text",
    "message_from_dict",
    "nbytes",
    "pack",
    "unpack",
]
