"""multipart/form-data (RFC 7578) of a body that is whole and no larger than its limit: a file for each part.

Strict on purpose: browsers, curl and every client library write what it reads, and what it does not read is refused.
"""

import re

from pipeline.serving.batching import Upload
from pipeline.serving.exchange import RefusedError

MAX_PART_HEAD_BYTES = 4096
BOUNDARY = re.compile(
    r"""multipart/form-data\s*;(?:.*;)?\s*boundary=(?:"([^"]{1,70})"|([^\s;",]{1,70}))\s*(?:;.*)?""", re.IGNORECASE
)
# In a quoted name browsers write %22 for a quote; others escape it with a backslash.
PARAMETER = re.compile(rb""";\s*(name|filename)=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))""", re.IGNORECASE)


def read_form(content_type: str, body: bytes | bytearray, max_parts: int) -> list[Upload]:
    """The files of a form, by whatever field names. Raises RefusedError for what is no form, has no file, or too many parts."""
    match = BOUNDARY.fullmatch(content_type.strip())
    if match is None:
        raise RefusedError(400, "the Content-Type names no boundary: multipart/form-data; boundary=...")
    delimiter = b"--" + (match[1] or match[2]).encode("latin-1")
    if not body.startswith(delimiter):
        raise RefusedError(400, "the form does not begin with its boundary.")
    uploads, num_parts = list[Upload](), 0
    place = len(delimiter)
    while not body.startswith(b"--", place):
        if not body.startswith(b"\r\n", place):
            raise RefusedError(400, "a boundary of the form is not followed by a line break.")
        if num_parts == max_parts:
            raise RefusedError(413, f"a request may have {max_parts} images.")
        num_parts += 1
        end_of_head = body.find(b"\r\n\r\n", place, place + MAX_PART_HEAD_BYTES)
        end = body.find(b"\r\n" + delimiter, max(place, end_of_head + 2))
        if end_of_head < 0 or end < end_of_head:
            raise RefusedError(400, f"part {num_parts} of the form is not whole.")
        head, content = bytes(body[place:end_of_head]), bytes(body[end_of_head + 4 : end])
        is_left_empty = not content and b'filename=""' in head  # a field for files that nobody filled in
        if not is_left_empty:
            uploads.append(Upload(_file_name(head) or f"image {num_parts}", content))
        place = end + 2 + len(delimiter)
    if not uploads:
        raise RefusedError(400, "the form has no file.")
    return uploads


def _file_name(head: bytes) -> str:
    """The name of the file, or of the field; empty where there is neither."""
    for line in head.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-disposition":
            found = {name.lower(): quoted or plain for name, quoted, plain in PARAMETER.findall(value)}
            name = found.get(b"filename") or found.get(b"name") or b""
            if b"\\" in name:
                name = re.sub(rb"\\(.)", rb"\1", name)
            return name.decode("utf-8", errors="replace")[:200]
    return ""
