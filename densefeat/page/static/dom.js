// Elements, requests, and the state in the address.
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

// The address of something that the browser keeps: another store may have had the same one.
let version = "";
export function setVersion(text) { version = text; }
export const kept = (path) => `${path}${path.includes("?") ? "&" : "?"}v=${version}`;

export async function get(path, options = {}) {
  let response;
  try { response = await fetch(path, options); } catch { throw new Error("The page does not answer: is the command still running?"); }
  if (!response.ok) {
    const text = await response.text();
    let reason = text;
    try { reason = JSON.parse(text).error; } catch { /* plain text */ }
    throw new Error(reason || response.statusText);
  }
  return response;
}

export const json = async (path, options) => (await get(path, options)).json();
export const count = (number) => number.toLocaleString("en");
export const parameters = () => new URLSearchParams(location.search);

// Change parameters of the address; null removes one. `keep`: as a new entry of the history.
export function setParameters(changes, keep = false) {
  const query = parameters();
  for (const [name, value] of Object.entries(changes)) {
    if (value == null || value === "") query.delete(name);
    else query.set(name, value);
  }
  const text = query.toString().replaceAll("%2C", ",");
  const address = location.pathname + (text ? `?${text}` : "");
  history[keep ? "pushState" : "replaceState"](keep ? null : history.state, "", address);
}

export function choice(label, options, chosen, choose) {
  const buttons = Object.entries(options).map(([value, text]) => element("button", {
    type: "button", "data-value": value, "aria-pressed": String(value === chosen), onclick: () => choose(value) }, text));
  return element("div", { class: "choice", role: "group", "aria-label": label }, ...buttons);
}

// A picture. Without `instead`, an event "missing" says why there is none; with it, the picture is loaded when it is
// scrolled to, and replaced by that text if there is none; its title says why.
export function picture(source, description, instead = null) {
  const image = element("img", { alt: description, loading: instead ? "lazy" : "eager", draggable: "false" });
  const reason = async () => { try { await get(source); } catch (error) { return error.message; } return "cannot be shown"; };
  image.addEventListener("error", async () => {
    if (!instead) image.dispatchEvent(new CustomEvent("missing", { detail: await reason() }));
    else {
      const none = element("div", { class: "none" }, instead);
      none.addEventListener("pointerenter", async () => { none.title = await reason(); }, { once: true });
      image.replaceWith(none);
    }
  });
  image.src = source;
  return image;
}
