// All images, by page, with filters.
import { choice, count, element, json, kept, parameters, picture, setParameters } from "./dom.js";

const SIZE = 96, SHOW = { both: "Both", photograph: "Photographs", colours: "Features" };

export async function wall(view, store, redraw) {
  const query = parameters(), page = Math.min(Math.max(1, Math.floor(Number(query.get("page"))) || 1), Math.ceil(store.rows / SIZE) || 1), show = query.get("show") in SHOW ? query.get("show") : "both";
  const change = (changes, keep = true) => { setParameters({ page: null, ...changes }, keep); redraw(); };
  const asked = new URLSearchParams({ limit: SIZE, offset: (page - 1) * SIZE });
  for (const name of ["q", "status", "label"]) if (query.get(name)) asked.set(name, query.get(name));
  const found = await json(`/api/rows?${asked}`), pages = Math.max(1, Math.ceil(found.total / SIZE));
  if (page > pages) {
    setParameters({ page: pages > 1 ? pages : null });
    return wall(view, store, redraw);
  }
  const go = (to) => change({ page: to > 1 ? to : null });
  const turn = () => element("span", { class: "choice push" },
    element("button", { type: "button", disabled: page <= 1, "aria-label": "Previous page", onclick: () => go(page - 1) }, "‹"),
    element("button", { type: "button", class: "pageno", onclick: () => ask(pages, go) }, `${count(page)} of ${count(pages)}`),
    element("button", { type: "button", disabled: page >= pages, "aria-label": "Next page", onclick: () => go(page + 1) }, "›"));
  const search = element("input", { type: "search", placeholder: "Search by key", "aria-label": "Search by key", value: query.get("q") || "",
    onchange: (event) => change({ q: event.target.value }) });
  const bar = element("div", { class: "bar" }, search, statuses(store, query, change), labels(store, query, change),
    choice("Show", SHOW, show, (value) => change({ show: value === "both" ? null : value, page: query.get("page") })),
    pages > 1 ? turn() : null);
  const tiles = found.rows.map((row) => tile(row, show));
  const grid = element("div", { class: "wall" }, ...tiles);
  grid.style.setProperty("--tile", show === "both" ? "290px" : "170px");
  const pending = store.statuses.pending || 0;
  view.replaceChildren(bar,
    pending ? element("p", { class: "notice" }, progress(store, pending)) : "",
    element("p", { class: "soft small" }, found.total === store.rows ? images(found.total) : `${count(found.total)} of ${images(store.rows)}`),
    found.rows.length ? grid : element("p", { class: "none" }, "No image matches. Clear the search or the filters."),
    pages > 1 ? element("div", { class: "bar" }, turn()) : "");
  return { ArrowLeft: () => page > 1 && go(page - 1), ArrowRight: () => page < pages && go(page + 1), "/": () => search.focus(),
    Escape: () => location.search && (history.pushState(null, "", "/"), redraw()) };
}

const images = (number) => `${count(number)} ${number === 1 ? "image" : "images"}`;

function progress(store, pending) {
  const done = `${count(store.rows - pending)} of ${images(store.rows)}`;
  if (store.unread_shards) return `This store is still being made. The records of ${count(store.unread_shards)} finished shards are being read; ${done} are done in the others.`;
  return `This store is still being made: ${done} ${store.rows === 1 ? "is" : "are"} done.`;
}

function ask(pages, go) {
  const page = Number(prompt(`Page, 1 to ${pages}`));
  if (page >= 1 && page <= pages) go(Math.floor(page));
}

function statuses(store, query, change) {
  const options = Object.entries(store.statuses).map(([name, rows]) => [name, `${name} (${count(rows)})`]);
  return select("Status", [["", "Any status"], ...options], query.get("status"), (status) => change({ status }));
}

function labels(store, query, change) {
  if (!store.labels.length) return null;
  const options = store.labels.map(({ label, name, rows }) => [String(label), `${name} (${count(rows)})`]);
  return select("Label", [["", "Any label"], ...options], query.get("label"), (label) => change({ label }));
}

function select(name, options, chosen, choose) {
  return element("select", { "aria-label": name, onchange: (event) => choose(event.target.value) },
    ...options.map(([value, text]) => element("option", { value, selected: value === (chosen || "") }, text)));
}

function tile(row, show) {
  const ok = row.status === "ok", parts = [];
  if (ok && show !== "colours") parts.push(picture(kept(`/api/photograph/${row.row}?size=256`), `Photograph ${row.key}`, "no photograph"));
  if (ok && show !== "photograph") parts.push(picture(kept(`/api/colours/${row.row}`), `Features of ${row.key}`, "features cannot be read"));
  if (!ok) parts.push(element("div", { class: `none ${row.status === "pending" ? "" : "bad"}` }, row.error ? `${row.status}: ${row.error}` : row.status));
  const inside = element("div", { class: "pair" }, ...parts);
  if (!ok && show === "both") inside.style.setProperty("--ratio", "2 / 1");
  return element("a", { class: "tile", href: `/image/${row.row}`, "data-row": row.row }, inside,
    element("div", { class: "name" }, element("b", { title: row.key }, row.key), row.label_name ? element("span", {}, row.label_name) : null));
}
