// From the bytes of a photo to upright RGB pixels, transparent ones laid on the model's background.
//
// A browser would show a photo by its colour profile, and a canvas keeps transparent pixels only multiplied by their alpha;
// training saw neither. So both are switched off, and what the canvas did to transparency is within a level of 255.

const MAX_PIXELS = 100_000_000; // as in pipeline/preprocess.py
const TILE = 2048; // a canvas of a whole photo is more than phones allow

// An image {width, height, data} of `blob`. Throws an Error that says why there is none.
export async function decode(blob, background) {
  const bitmap = await bitmapOf(blob);
  try {
    const { width, height } = bitmap;
    if (width * height > MAX_PIXELS) throw new Error(`${width} x ${height} pixels are too many.`);
    const data = new Uint8ClampedArray(3 * width * height);
    for (let top = 0; top < height; top += TILE) {
      for (let left = 0; left < width; left += TILE) copyTile(bitmap, left, top, background, data);
    }
    return { width, height, data };
  } finally {
    bitmap.close();
  }
}

async function bitmapOf(blob) {
  try {
    return await createImageBitmap(blob, {
      imageOrientation: "from-image",
      premultiplyAlpha: "none",
      colorSpaceConversion: "none",
    });
  } catch {
    throw new Error("This is not a whole image of a kind that this browser can read (JPEG, PNG, WebP, GIF, BMP).");
  }
}

function copyTile(bitmap, left, top, background, data) {
  const width = Math.min(TILE, bitmap.width - left);
  const height = Math.min(TILE, bitmap.height - top);
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, -left, -top);
  const pixels = context.getImageData(0, 0, width, height).data; // RGBA
  for (let row = 0, from = 0; row < height; row += 1) {
    let to = 3 * ((top + row) * bitmap.width + left);
    for (let column = 0; column < width; column += 1, from += 4, to += 3) {
      const alpha = pixels[from + 3];
      for (let channel = 0; channel < 3; channel += 1) {
        const level = pixels[from + channel];
        // A clamped array rounds.
        data[to + channel] = alpha === 255 ? level : (level * alpha + background[channel] * (255 - alpha)) / 255;
      }
    }
  }
}
