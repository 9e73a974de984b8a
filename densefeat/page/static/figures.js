// The store in figures.
import { count, element, json } from "./dom.js";

const bytes = (value) => value >= 1e9 ? `${(value / 1e9).toFixed(2)} GB` : value >= 1e6 ? `${(value / 1e6).toFixed(2)} MB` : `${(value / 1e3).toFixed(1)} kB`;
const card = (title, ...inside) => element("section", { class: "card" }, element("h2", {}, title), ...inside);
const big = (text, under) => [element("div", { class: "big" }, text), element("div", { class: "soft small" }, under)];
const table = (rows) => element("table", {}, element("tbody", {}, ...rows.map((cells) => element("tr", {}, ...cells))));
const cell = (content, kind) => element("td", { class: kind }, content);

export async function figures(view, store) {
  const found = await json("/api/figures"), each = found.images ? found.bytes / found.images : 0;
  const share = found.explained_variance_ratio.reduce((sum, one) => sum + one, 0);
  const code = `from densefeat import FeatureStore\nstore = FeatureStore(${JSON.stringify(store.uri)})\nfeatures = store.read(0)  # [${store.k}, ${store.height}, ${store.width}] float32`;
  const cards = [
    card("Images", ...big(count(found.images), `with features, of ${count(store.rows)}; ${store.finished ? "finished" : "still being made"}`)),
    card("Variance explained", ...big(`${(100 * share).toFixed(1)} %`, `by ${store.k} components`), bars(found.explained_variance_ratio)),
    card("Bytes an image", ...big(found.images ? bytes(each) : "none", found.images ? `${bytes(found.bytes)} together; ${(found.uncompressed_bytes_per_image / each).toFixed(1)} times smaller than uncompressed` : "No image has features."), found.sizes ? bars(found.sizes.counts) : ""),
    card("Seconds by stage", ...seconds(found, store)),
    card("Failures", found.failures.length ? failures(found.failures) : element("p", { class: "soft" }, "No image failed.")),
    card("Read it", element("pre", {}, code), copy(code)),
    card("Configuration", table([...flat(found.configuration), ...flat({ versions: found.versions }), ["hash", found.configuration_hash]].map(([name, value]) => [cell(name), cell(value)]))),
  ];
  cards.at(-1).classList.add("wide");
  view.replaceChildren(element("div", { class: "cards" }, ...cards));
  return {};
}

function seconds(found, store) {
  if (!found.seconds) return [element("p", { class: "soft" }, "Known when the first shard is finished.")];
  const shards = `${count(found.shards)} ${found.shards === 1 ? "shard" : "shards"}`;
  return [meters(found.seconds, found.timed_images), store.finished ? "" : element("p", { class: "soft small" }, `Of the ${count(found.timed_images)} images in ${shards} that are done.`)];
}

function bars(values) {
  const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg"), top = Math.max(...values, 1e-12);
  svg.setAttribute("viewBox", `0 0 ${values.length} 1`);
  svg.setAttribute("preserveAspectRatio", "none");
  values.forEach((value, i) => {
    const bar = document.createElementNS(space, "rect");
    for (const [name, one] of Object.entries({ x: i + .08, y: 1 - value / top, width: .84, height: value / top })) bar.setAttribute(name, one);
    svg.append(bar);
  });
  return svg;
}

function meters(seconds, images) {
  const top = Math.max(...Object.values(seconds), 1e-9);
  return table(Object.entries(seconds).map(([stage, value]) => {
    const bar = element("div", { class: "meter" });
    bar.style.width = `${(100 * value) / top}%`;
    return [cell(stage), cell(bar, "m"), cell(`${value.toFixed(1)} s`, "n"), cell(`${((1000 * value) / (images || 1)).toFixed(1)} ms an image`, "n soft")];
  }));
}

function failures(groups) {
  return table(groups.map((one) => [cell(count(one.rows), "n"), cell(`${one.status}: ${one.error ?? ""}`), cell(element("a", { href: `/image/${one.first}` }, `row ${one.first}`))]));
}

function flat(value, path = "") {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return [[path, Array.isArray(value) ? value.join(" × ") : String(value)]];
  return Object.entries(value).flatMap(([name, one]) => flat(one, path ? `${path}.${name}` : name));
}

function copy(text) {
  const button = element("button", { type: "button", onclick: async () => {
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { button.textContent = "Select the lines to copy them"; }
  } }, "Copy");
  return button;
}
