// One image: its layers, and everything like a point or a box of it.
import { choice, element, get, json, kept, parameters, picture, setParameters } from "./dom.js";
import { drawHeat } from "./heat.js";

const LAYERS = { photograph: "Photograph", features: "Features", component: "Component", segments: "Segments" };

export async function image(view, store, redraw, open) {
  const number = location.pathname.split("/")[2], row = await json(`/api/image/${number}`), query = parameters();
  // Whatever an address says, or one that was kept of another store.
  const whole = (name, low, high, otherwise) => Math.min(Math.max(Math.round(+(query.get(name) ?? otherwise)) || low, low), high);
  const numbers = (name, many) => { const text = query.get(name); return text && text.split(",").length === many && text.split(",").every((one) => one !== "" && Number.isFinite(+one)) ? text : null; };
  const state = { layer: Object.hasOwn(LAYERS, query.get("layer")) ? query.get("layer") : "features", component: whole("component", 0, store.k - 1, 0),
    segments: whole("segments", 2, 16, 6), opacity: whole("opacity", 0, 100, 70), point: numbers("point", 2), box: numbers("box", 4),
    text: store.texts.includes(query.get("text")) ? query.get("text") : null };
  const facts = [row.label_name, row.width ? `${row.width}×${row.height}` : null, row.chunk_nbytes ? `${(row.chunk_nbytes / 1e6).toFixed(2)} MB` : null];
  const step = (to, text, name) => element("button", { type: "button", "aria-label": name, disabled: to == null, onclick: () => open(`/image/${to}${layerOnly()}`) }, text);
  const title = element("div", { class: "bar" }, element("div", {}, element("h1", {}, row.key), element("div", { class: "soft small" }, [`row ${row.row}`, ...facts].filter(Boolean).join(" · "))),
    element("span", { class: "choice push" }, step(row.previous, "‹", "Previous image"), step(row.next, "›", "Next image")));
  const keys = { ArrowLeft: () => row.previous != null && open(`/image/${row.previous}${layerOnly()}`),
    ArrowRight: () => row.next != null && open(`/image/${row.next}${layerOnly()}`), Escape: () => open("/") };
  if (row.status !== "ok") {
    const reason = row.status === "pending" ? "This image is not done yet: its shard is pending." : `This image has no features: ${row.status}: ${row.error}`;
    view.replaceChildren(title, element("p", { class: `notice ${row.status === "pending" ? "" : "bad"}` }, reason), element("p", { class: "soft small" }, row.uri));
    return keys;
  }
  const notice = element("div"), over = element("img", { class: "over", alt: "" }), heat = element("canvas", { class: "over", id: "heat" });
  const spot = element("div", { class: "spot", hidden: true }), stage = element("div", { class: "stage", id: "stage" });
  const photo = picture(kept(`/api/photograph/${number}?size=1024`), `Photograph ${row.key}`);
  let noPhotograph = false;
  photo.addEventListener("missing", (event) => {
    noPhotograph = true;
    photo.hidden = true;
    notice.append(element("p", { class: "notice", id: "no-photograph" }, `The photograph ${event.detail}`));
    draw();
  });
  over.addEventListener("error", async () => {
    let reason = "unknown";
    try { await get(over.getAttribute("src")); } catch (error) { reason = error.message; }
    if (!document.getElementById("no-features")) notice.append(element("p", { class: "notice bad", id: "no-features" }, `The features cannot be shown: ${reason}`));
  });
  stage.append(photo, over, heat, spot);
  const controls = element("div"), others = element("div", { class: "others" }), othersTitle = element("h2"), othersNote = element("p", { class: "soft small" });
  const texts = element("select", { id: "text", onchange: (event) => { select({ text: event.target.value || null, point: null, box: null }); texts.focus(); } },
    element("option", { value: "" }, "none"), ...store.texts.map((name) => element("option", { value: name }, name)));
  const asking = store.texts.length ? element("div", { class: "under" }, element("label", { for: "text" }, "Text"), texts) : null;
  view.replaceChildren(title, notice, element("div", { class: "looking" }, element("div", {}, ...[stage, asking, controls].filter(Boolean)),
    element("aside", {}, othersTitle, othersNote, others)));

  const region = () => state.box ? `box=${state.box}` : state.point ? `point=${state.point}` : null;
  const selected = () => region() ?? (state.text == null ? null : `text=${encodeURIComponent(state.text)}`);
  function layerOnly() {
    const query = new URLSearchParams();
    for (const name of ["layer", "component", "segments", "opacity", "text"]) if (parameters().get(name)) query.set(name, parameters().get(name));
    return query.size ? `?${query}` : "";
  }
  function set(changes, keep = false) {
    Object.assign(state, changes);
    setParameters(changes, keep);
    draw();
  }
  // A point, a box or a text; or none, with another layer perhaps.
  function select(changes, keep = true) {
    if (!(changes.point || changes.box || changes.text)) { hovering = false; heat.hidden = true; }
    set({ point: null, box: null, text: null, ...changes }, keep);
    place();
    if (selected()) showHeat(selected());
    more();
  }
  function draw() {
    const sources = { features: kept(`/api/colours/${number}`), component: kept(`/api/component/${number}?component=${state.component}`),
      segments: kept(`/api/segments/${number}?count=${state.segments}`) };
    const layer = noPhotograph && state.layer === "photograph" ? "features" : state.layer, hot = !heat.hidden;
    over.hidden = hot || layer === "photograph";
    if (!over.hidden && over.getAttribute("src") !== sources[layer]) over.src = sources[layer];
    const opacity = noPhotograph ? 1 : state.opacity / 100;
    over.style.opacity = opacity;
    heat.style.opacity = opacity;
    texts.value = state.text ?? "";
    panel(layer, hot);
  }
  function panel(layer, hot) {
    const active = document.activeElement?.dataset?.control;
    const range = (name, text, low, high) => element("label", {}, text, element("input", { type: "range", min: low, max: high, value: state[name], "data-control": name,
      oninput: (event) => set({ [name]: +event.target.value }) }), element("output", {}, name === "opacity" ? `${state[name]} %` : String(state[name])));
    const dim = noPhotograph || (layer === "photograph" && !hot) ? null : range("opacity", "Opacity", 0, 100);
    controls.replaceChildren(
      element("div", { class: "under" }, choice("Layer", LAYERS, state.layer, (value) => select({ layer: value }))),
      element("div", { class: "under" }, layer === "component" && !hot ? range("component", "Component", 0, store.k - 1) : null,
        layer === "segments" && !hot ? range("segments", "Segments", 2, 16) : null, dim,
        hot ? element("span", { class: "scale" }, ends[0], element("i"), ends[1]) : null),
      element("p", { class: "soft small" }, selected() ? "Esc clears the selection." : "Point at a pixel to see what is like it; click to keep it; drag a box for a region."));
    if (active) controls.querySelector(`[data-control=${active}]`)?.focus();
  }
  let busy = false, waiting = null, ends = [];
  async function showHeat(asked) {
    if (busy) { waiting = asked; return; }
    busy = true;
    try {
      const answer = await get(kept(`/api/heat/${number}?from=${number}&${asked}`)), values = new Uint8Array(await answer.arrayBuffer());
      if (selected() === asked || (!selected() && hovering)) {
        drawHeat(heat, values, store.width, store.height);
        heat.hidden = false;
        heat.dataset.selection = asked;
        ends = asked.startsWith("text=") ? answer.headers.get("Heat-Range").split(" ").map((value) => (+value).toFixed(3)) : ["unlike", "alike"];
        draw();
      }
    } catch (error) { notice.replaceChildren(element("p", { class: "notice bad" }, error.message)); }
    busy = false;
    if (waiting) { const next = waiting; waiting = null; showHeat(next); }
  }
  function place(box = state.box) {
    const numbers = (box || state.point || "").split(",").map(Number);
    spot.hidden = !(box || state.point);
    spot.className = box ? "spot" : "spot point";
    const percent = (value, whole) => `${(100 * value) / whole}%`;
    spot.style.left = percent(numbers[0], store.width);
    spot.style.top = percent(numbers[1], store.height);
    spot.style.width = box ? percent(numbers[2] - numbers[0], store.width) : "";
    spot.style.height = box ? percent(numbers[3] - numbers[1], store.height) : "";
  }
  async function more() {
    const asked = region();
    let found;
    try { found = await json(asked ? `/api/similar?from=${number}&${asked}` : `/api/nearest/${number}`); } catch { return; }
    if (asked !== region() || !view.contains(stage)) return;
    othersTitle.textContent = asked ? "The same in other images" : "Nearest images";
    const among = (number) => `${number.toLocaleString("en")} ${number === 1 ? "image" : "images"}`;
    const { images, of, complete } = found.sample;
    othersNote.textContent = complete ? (found.matches.length ? `Among ${images} of ${among(store.rows)}.` : "No other image has features.") : `Reading images: ${images} of ${of}…`;
    others.replaceChildren(...found.matches.slice(0, 18).map((match) => other(match, asked)));
    if (!complete) setTimeout(() => stage.isConnected && asked === region() && more(), 1200);
  }
  function other(match, asked) {
    const inside = element("div", { class: "pair" }, noPhotograph ? picture(kept(`/api/colours/${match.row}`), match.key, "features cannot be read") : picture(kept(`/api/photograph/${match.row}?size=256`), match.key, "no photograph"));
    if (asked) heatOver(inside, match.row, asked);
    const at = asked ? `?point=${(match.x * store.width).toFixed(1)},${(match.y * store.height).toFixed(1)}` : layerOnly();
    return element("a", { class: "tile", href: `/image/${match.row}${at}`, title: match.key }, inside,
      element("div", { class: "name" }, element("b", {}, match.key), element("span", {}, match.cosine.toFixed(2))));
  }
  async function heatOver(inside, row, asked) {
    try {
      const values = new Uint8Array(await (await get(kept(`/api/heat/${row}?from=${number}&${asked}`))).arrayBuffer());
      const canvas = element("canvas");
      canvas.style.opacity = .65;
      drawHeat(canvas, values, store.width, store.height);
      inside.append(canvas);
    } catch { /* the row is shown without it */ }
  }

  const at = (event) => {
    const frame = stage.getBoundingClientRect();
    const part = (value, size) => Math.min(Math.max(value, 0), 0.9999) * size;
    return [part((event.clientX - frame.left) / frame.width, store.width), part((event.clientY - frame.top) / frame.height, store.height)];
  };
  const boxOf = (a, b) => [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])].map((value) => value.toFixed(1)).join(",");
  let from = null, hovering = false;
  const dragged = (event) => from && Math.hypot(event.clientX - from.x, event.clientY - from.y) > 6;
  stage.addEventListener("pointerdown", (event) => { if (event.button === 0) { from = { x: event.clientX, y: event.clientY, at: at(event) }; stage.setPointerCapture(event.pointerId); } });
  stage.addEventListener("pointermove", (event) => {
    if (dragged(event)) place(boxOf(from.at, at(event)));
    else if (!from && !selected() && event.pointerType === "mouse") { hovering = true; showHeat(`point=${at(event).map((value) => value.toFixed(1)).join(",")}`); }
  });
  stage.addEventListener("pointerup", (event) => {
    if (!from) return;
    const end = at(event), keep = selected() == null, box = dragged(event);
    select(box ? { box: boxOf(from.at, end) } : { point: end.map((value) => value.toFixed(1)).join(",") }, keep);
    from = null;
  });
  stage.addEventListener("pointercancel", () => { from = null; place(); });
  stage.addEventListener("pointerleave", () => { hovering = false; if (!selected()) { heat.hidden = true; draw(); } });
  heat.hidden = true;
  place();
  draw();
  more();
  if (selected()) showHeat(selected());
  const layers = Object.fromEntries(Object.keys(LAYERS).map((layer, i) => [String(i + 1), () => select({ layer })]));
  const nudge = (by) => () => {
    if (state.layer === "component") set({ component: Math.min(Math.max(state.component + by, 0), store.k - 1) });
    if (state.layer === "segments") set({ segments: Math.min(Math.max(state.segments + by, 2), 16) });
  };
  const clear = () => {
    if (!selected()) { open("/"); return; }
    select({});
  };
  return { ...keys, ...layers, ArrowUp: nudge(1), ArrowDown: nudge(-1), Escape: clear };
}
