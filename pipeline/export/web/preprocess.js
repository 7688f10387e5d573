// From the pixels of a decoded image to those that the network takes: what pipeline/preprocess.py does, number for number.
//
// An image is {width, height, data}: RGB, one byte a channel, row by row. The resize is Pillow's: a filter as wide as what is
// merged into one pixel, weights in fixed point, one direction after the other with rounding to bytes in between
// (https://github.com/python-pillow/Pillow, src/libImaging/Resample.c; sampling without a filter: Geometry.c). A canvas
// resizes otherwise in every browser.

const PRECISION_BITS = 22; // 32 less 8 of a channel and 2 for weights that overshoot

const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, weight: (x) => cubic(Math.abs(x)) },
  lanczos: { support: 3, weight: (x) => (-3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

function cubic(x) {
  const a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

// The pixels that the network takes, as the model's PreprocessSpec says.
export function preprocess(image, spec) {
  let result = image;
  if (spec.resize !== null) result = resize(result, spec);
  if (spec.crop !== null) result = centerCrop(result, spec);
  return result;
}

// [H, W] of what `preprocess` gives, whatever it is given.
export function inputSize(spec) {
  return spec.crop ?? spec.resize;
}

// One image as the network's input: (3, H, W) instead of (H, W, 3).
export function toTensor({ width, height, data }) {
  const plane = width * height;
  const tensor = new Uint8Array(3 * plane);
  for (let at = 0; at < plane; at += 1) {
    tensor[at] = data[3 * at];
    tensor[plane + at] = data[3 * at + 1];
    tensor[2 * plane + at] = data[3 * at + 2];
  }
  return tensor;
}

// Python's `round`: a half goes to the even neighbour.
function round(x) {
  const low = Math.floor(x);
  if (x - low !== 0.5) return Math.round(x);
  return low % 2 === 0 ? low : low + 1;
}

function newSize({ width, height }, spec) {
  if (Array.isArray(spec.resize)) return [spec.resize[1], spec.resize[0]];
  const whole = spec.resize_mode === "torchvision" ? Math.trunc : round;
  const shortest = Math.min(width, height);
  return [width, height].map((side) => Math.max(1, whole((side * spec.resize) / shortest)));
}

function resize(image, spec) {
  const [width, height] = newSize(image, spec);
  if (width === image.width && height === image.height) return image;
  if (spec.interpolation === "nearest") return pick(image, width, height);
  if (!spec.antialias) return sample(image, width, height, spec.interpolation);
  const filter = FILTERS[spec.interpolation];
  const rows = (each) => (width === each.width ? each : resampleRows(each, width, filter));
  const columns = (each) => (height === each.height ? each : resampleColumns(each, height, filter));
  // Pillow begins with the height, from release 13 on, where it shrinks much more than the width; the order is worth a level.
  const shrinkage = image.height - height;
  const heightFirst = shrinkage > 0 && shrinkage > 2 * (image.width - width);
  return heightFirst ? rows(columns(image)) : columns(rows(image));
}

// Which pixels of a side make up each new one, and their weights: `first` and `count` of the pixels, `weights` of `stride` each.
function coefficients(size, newLength, filter) {
  const scale = size / newLength;
  const filterScale = Math.max(scale, 1);
  const support = filter.support * filterScale;
  const stride = Math.ceil(support) * 2 + 1;
  const first = new Int32Array(newLength);
  const count = new Int32Array(newLength);
  const weights = new Int32Array(newLength * stride);
  for (let place = 0; place < newLength; place += 1) {
    const center = (place + 0.5) * scale;
    first[place] = Math.max(0, Math.trunc(center - support + 0.5));
    count[place] = Math.min(size, Math.trunc(center + support + 0.5)) - first[place];
    const exact = [];
    for (let at = 0; at < count[place]; at += 1) {
      exact.push(filter.weight((at + first[place] - center + 0.5) * (1 / filterScale)));
    }
    const total = exact.reduce((sum, weight) => sum + weight, 0);
    exact.forEach((weight, at) => {
      const fixed = (total === 0 ? weight : weight / total) * 2 ** PRECISION_BITS;
      weights[place * stride + at] = Math.trunc(fixed + (fixed < 0 ? -0.5 : 0.5));
    });
  }
  return { first, count, weights, stride };
}

function resampleRows(image, width, filter) {
  const { first, count, weights, stride } = coefficients(image.width, width, filter);
  const data = new Uint8ClampedArray(3 * width * image.height);
  for (let row = 0, to = 0; row < image.height; row += 1) {
    for (let column = 0; column < width; column += 1, to += 3) {
      const from = 3 * (row * image.width + first[column]);
      merge(image.data, from, 3, weights, column * stride, count[column], data, to);
    }
  }
  return { width, height: image.height, data };
}

function resampleColumns(image, height, filter) {
  const { first, count, weights, stride } = coefficients(image.height, height, filter);
  const data = new Uint8ClampedArray(3 * image.width * height);
  for (let row = 0, to = 0; row < height; row += 1) {
    for (let column = 0; column < image.width; column += 1, to += 3) {
      const from = 3 * (first[row] * image.width + column);
      merge(image.data, from, 3 * image.width, weights, row * stride, count[row], data, to);
    }
  }
  return { width: image.width, height, data };
}

// The weighted sum of `count` pixels, `step` bytes apart. A clamped array keeps it within 0 and 255.
function merge(data, from, step, weights, firstWeight, count, into, to) {
  let red = 1 << (PRECISION_BITS - 1);
  let green = red;
  let blue = red;
  for (let at = 0; at < count; at += 1, from += step) {
    const weight = weights[firstWeight + at];
    red = (red + data[from] * weight) | 0;
    green = (green + data[from + 1] * weight) | 0;
    blue = (blue + data[from + 2] * weight) | 0;
  }
  into[to] = red >> PRECISION_BITS;
  into[to + 1] = green >> PRECISION_BITS;
  into[to + 2] = blue >> PRECISION_BITS;
}

// The nearest pixel; positions are added up, since their rounding decides which one is nearest.
function pick(image, width, height) {
  const columns = nearestPlaces(image.width, width);
  const rows = nearestPlaces(image.height, height);
  const data = new Uint8ClampedArray(3 * width * height);
  for (let row = 0, to = 0; row < height; row += 1) {
    for (let column = 0; column < width; column += 1, to += 3) {
      const from = 3 * (rows[row] * image.width + columns[column]);
      for (let channel = 0; channel < 3; channel += 1) data[to + channel] = image.data[from + channel];
    }
  }
  return { width, height, data };
}

function nearestPlaces(size, newLength) {
  const step = size / newLength;
  const places = [];
  for (let place = 0, at = step * 0.5; place < newLength; place += 1, at += step) places.push(Math.min(size - 1, Math.trunc(at)));
  return places;
}

// Without a filter: 2 or 4 neighbours in each direction, however much is left out between them.
const SAMPLERS = {
  bilinear: { before: 0, curve: ([a, b], d) => a + (b - a) * d, reach: 2 },
  bicubic: {
    before: 1,
    reach: 4,
    curve: ([a, b, c, e], d) => b + d * (-a + c + d * (2 * (a - b) + c - e + d * (-a + b - c + e))),
  },
};

function sample(image, width, height, interpolation) {
  const { before, reach, curve } = SAMPLERS[interpolation];
  const data = new Uint8ClampedArray(3 * width * height);
  const near = (place, size) => Math.max(0, Math.min(size - 1, place));
  for (let row = 0, to = 0; row < height; row += 1) {
    const y = (row + 0.5) * (image.height / height) - 0.5;
    const top = Math.floor(y);
    for (let column = 0; column < width; column += 1) {
      const x = (column + 0.5) * (image.width / width) - 0.5;
      const left = Math.floor(x);
      for (let channel = 0; channel < 3; channel += 1, to += 1) {
        const rows = [];
        for (let down = 0; down < reach; down += 1) {
          const start = 3 * image.width * near(top - before + down, image.height) + channel;
          const values = [];
          for (let along = 0; along < reach; along += 1) {
            values.push(image.data[start + 3 * near(left - before + along, image.width)]);
          }
          rows.push(curve(values, x - left));
        }
        data[to] = Math.trunc(curve(rows, y - top));
      }
    }
  }
  return { width, height, data };
}

// The middle of an image; where it is too small, on a canvas of the background's colour.
function centerCrop(image, spec) {
  const [height, width] = spec.crop;
  const padded = { width: Math.max(width, image.width), height: Math.max(height, image.height) };
  const shift = { x: Math.floor((padded.width - image.width) / 2), y: Math.floor((padded.height - image.height) / 2) };
  const half = spec.resize_mode === "torchvision" ? (space) => round(space / 2) : (space) => Math.floor(space / 2);
  const left = half(padded.width - width) - shift.x;
  const top = half(padded.height - height) - shift.y;
  const data = new Uint8ClampedArray(3 * width * height);
  for (let row = 0, to = 0; row < height; row += 1) {
    for (let column = 0; column < width; column += 1, to += 3) {
      const x = column + left;
      const y = row + top;
      const inside = 0 <= x && x < image.width && 0 <= y && y < image.height;
      const from = 3 * (y * image.width + x);
      for (let channel = 0; channel < 3; channel += 1) {
        data[to + channel] = inside ? image.data[from + channel] : spec.background[channel];
      }
    }
  }
  return { width, height, data };
}
