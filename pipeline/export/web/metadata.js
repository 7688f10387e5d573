// What the model file says of itself: the entries under `shardline.` of its metadata.
//
// onnxruntime-web runs the graph and does not tell them. An ONNX file is a protobuf message (ModelProto of onnx.proto) whose
// field 14 is repeated: a key and a value; all other fields are stepped over.

const METADATA_PROPS = 14;
const KEY = 1;
const VALUE = 2;
const PREFIX = "shardline.";
const STRUCTURED = ["class_names", "preprocess", "metrics", "versions"];

// The metadata without their prefix, JSON parsed. Throws an Error where `bytes` is no Shardline model.
export function readMetadata(bytes) {
  const metadata = {};
  for (const [field, content] of fieldsOf(bytes)) {
    if (field !== METADATA_PROPS) continue;
    const entry = new Map(fieldsOf(content));
    const key = textOf(entry.get(KEY));
    if (key.startsWith(PREFIX)) metadata[key.slice(PREFIX.length)] = textOf(entry.get(VALUE));
  }
  for (const name of STRUCTURED) {
    if (metadata[name]) metadata[name] = JSON.parse(metadata[name]);
  }
  if (!metadata.class_names || !metadata.preprocess) throw new Error("model.onnx is not a Shardline model.");
  return metadata;
}

function textOf(bytes) {
  return new TextDecoder().decode(bytes ?? new Uint8Array());
}

// Number and content of each field that holds bytes (https://protobuf.dev/programming-guides/encoding).
function* fieldsOf(bytes) {
  let at = 0;
  const varint = () => {
    for (let value = 0, scale = 1; ; scale *= 128) {
      if (at >= bytes.length) throw new Error("model.onnx is cut short.");
      const byte = bytes[at];
      at += 1;
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const kind = tag % 8;
    if (kind === 2) {
      const length = varint();
      yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
      at += length;
    } else if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else throw new Error("model.onnx is not an ONNX file.");
  }
}
