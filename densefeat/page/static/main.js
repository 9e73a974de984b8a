// Views by address, theme, keyboard.
import { element, json, setVersion } from "./dom.js";
import { figures } from "./figures.js";
import { image } from "./image.js";
import { wall } from "./wall.js";

const view = document.getElementById("view"), dialog = document.getElementById("keys");
let keys = {}, drawn = 0, scrolled = 0;

// Where the reader was on this page, to be there again after the back button.
history.scrollRestoration = "manual";
addEventListener("scroll", () => {
  clearTimeout(scrolled);
  scrolled = setTimeout(() => history.replaceState({ scroll: scrollY }, ""), 150);
});

function open(address) {
  clearTimeout(scrolled);
  history.replaceState({ scroll: scrollY }, "");
  history.pushState(null, "", address);
  redraw();
}

async function redraw() {
  const turn = ++drawn, path = location.pathname, name = path === "/figures" ? "figures" : path.startsWith("/image/") ? "image" : "wall";
  const place = element("div");
  for (const link of document.querySelectorAll("nav a")) link.classList.toggle("here", link.dataset.view === name || (name === "image" && link.dataset.view === "wall"));
  let found = {}, problem = null;
  try {
    const store = await json("/api/store");
    problem = store.problem;
    setVersion(store.version);
    document.documentElement.style.setProperty("--ratio", `${store.width} / ${store.height}`);
    document.getElementById("where").textContent = store.uri;
    found = await { figures, image, wall }[name](place, store, redraw, open);
  } catch (error) {
    place.replaceChildren(element("p", { class: "notice bad" }, error.message));
    found = { Escape: () => open("/") };
  }
  if (turn !== drawn) return;
  keys = found;
  view.replaceChildren(...(problem ? [element("p", { class: "notice bad" }, `The store cannot be read now: ${problem}`)] : []), place);
  view.dataset.view = name;
  document.title = name === "image" ? `${place.querySelector("h1")?.textContent ?? "image"} · densefeat` : "densefeat";
  const shown = `${location.pathname} ${new URLSearchParams(location.search).get("page")}`;
  if (view.dataset.shown !== shown) scrollTo(0, history.state?.scroll ?? 0);
  view.dataset.shown = shown;
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='/']");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  open(link.getAttribute("href"));
});
document.addEventListener("keydown", (event) => {
  if (dialog.open || event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input, select");
  if (typing && event.key === "Escape") event.target.blur();
  if (typing) return;
  if (event.key === "?") dialog.showModal();
  else if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});
document.getElementById("help").addEventListener("click", () => dialog.showModal());

const root = document.documentElement, kept = localStorage.getItem("theme");
if (kept) root.dataset.theme = kept;
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
});
addEventListener("popstate", () => { clearTimeout(scrolled); redraw(); });
redraw();
