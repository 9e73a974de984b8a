// Similarities as colours: transparent and dark where unlike, bright where alike.
const stops = [[13, 8, 41], [106, 23, 110], [203, 65, 73], [251, 155, 6], [252, 255, 164]];
const table = new Uint8ClampedArray(256 * 3);
for (let value = 0; value < 256; value++) {
  const place = (value / 255) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
  for (let c = 0; c < 3; c++) table[3 * value + c] = stops[low][c] + (place - low) * (stops[low + 1][c] - stops[low][c]);
}

export function drawHeat(canvas, values, width, height) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  for (let i = 0; i < values.length; i++) {
    image.data.set(table.subarray(3 * values[i], 3 * values[i] + 3), 4 * i);
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
