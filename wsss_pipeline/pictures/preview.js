
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const AT_A_TIME = 100; // cards that are made as one scrolls
const NO_CLASS = "none", PROBLEM = "problem"; // beside the numbers of the classes

const [controls, list, end, classFilter, sort, marksFilter, search, overlay, save, status] = [
  "controls", "images", "end", "class", "sort", "marks", "search", "overlay", "save", "status",
].map((id) => document.getElementById(id));

// Marks outlive the page where the browser lets it keep anything.
const memory = `wsss preview ${data.identity}`;
const marked = new Set();
try {
  const lines = new Set(data.images.map((image) => image.line));
  for (const line of JSON.parse(localStorage.getItem(memory)) ?? []) if (lines.has(line)) marked.add(line);
} catch {
  // it keeps nothing, or something else
}

let shown = []; // what the filters leave of the images, in order
let cards = []; // of the first of these
let current = 0; // number, among these, of the one that keys act on

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** The doubt that an image is sorted by: of the class chosen, else the largest; above all where it has a problem. */
function doubt(image) {
  if (image.problem) return 2;
  const chosen = image.classes.filter(([number]) => String(number) === classFilter.value);
  return Math.max(0, ...(chosen.length ? chosen : image.classes).map(([, value]) => value));
}

function isOfClass(image) {
  if (classFilter.value === "") return true;
  if (classFilter.value === PROBLEM) return image.problem !== "";
  if (classFilter.value === NO_CLASS) return image.classes.length === 0 && image.problem === "";
  return image.classes.some(([number]) => String(number) === classFilter.value);
}

/** Filters and sorts anew; the current image stays so where it is still shown. */
function refresh() {
  const former = shown[current];
  const text = search.value.toLowerCase();
  shown = data.images.filter(
    (image) =>
      isOfClass(image) &&
      image.shown.toLowerCase().includes(text) &&
      (marksFilter.value === "all" || marked.has(image.line) === (marksFilter.value === "marked")),
  );
  if (sort.value === "doubt") {
    const doubts = new Map(shown.map((image) => [image, doubt(image)]));
    shown.sort((one, other) => doubts.get(other) - doubts.get(one));
  }
  list.replaceChildren();
  cards = [];
  current = Math.max(0, shown.indexOf(former));
  makeCards(current + 1);
  cards[current]?.classList.add("current");
  tell();
}

/** Cards for some more images, `least` of them all at least. */
function makeCards(least = 0) {
  const from = cards.length;
  const upTo = Math.min(shown.length, Math.max(from + AT_A_TIME, least));
  for (let number = from; number < upTo; number++) cards.push(card(shown[number], number));
  list.append(...cards.slice(from));
  end.textContent = shown.length ? "" : "No image.";
  // asks again whether the end is near: it may still be after a few cards
  nearEnd.unobserve(end);
  if (cards.length < shown.length) nearEnd.observe(end);
}
const nearEnd = new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && makeCards(), {
  rootMargin: "1500px",
});

function card(image, number) {
  const pictures = element("div", { className: "pictures" });
  for (const [source, className] of [[image.image, "photo"], [image.layer, "layer"]]) {
    if (source) pictures.append(element("img", { className, loading: "lazy", decoding: "async", alt: "", src: source }));
  }
  const classes = element("div", { className: "classes" });
  for (const [index, value, share] of image.classes) {
    const { name, colour } = data.classes[index];
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = colour;
    const percent = (100 * share).toFixed(1);
    const title = `doubt ${value.toFixed(3)}, ${percent} % of the pixels`;
    const named = element("bdi", { className: "name", textContent: name });
    classes.append(element("span", { title }, swatch, named, ` ${value.toFixed(2)}`), " ");
  }
  if (image.problem) classes.append(element("p", { className: "warning", textContent: image.problem }));
  else if (!image.classes.length) classes.append("background only");
  const button = element("button", { type: "button", textContent: "bad" });
  if (image.line === null) {
    button.disabled = true;
    button.title = "its id begins with a space: a list of ids can't name it; rename the file";
  }
  button.addEventListener("click", () => mark(number));
  const made = element(
    "li",
    { tabIndex: -1 },
    pictures,
    element("bdi", { className: "id", textContent: image.shown, title: image.shown }),
    classes,
    button,
  );
  made.addEventListener("click", () => select(number));
  showMark(made, image);
  return made;
}

function showMark(made, image) {
  const isMarked = marked.has(image.line);
  made.classList.toggle("bad", isMarked);
  made.querySelector("button").setAttribute("aria-pressed", String(isMarked));
}

function mark(number) {
  const image = shown[number];
  if (!image || image.line === null) return;
  if (!marked.delete(image.line)) marked.add(image.line);
  showMark(cards[number], image);
  try {
    localStorage.setItem(memory, JSON.stringify([...marked]));
  } catch {
    // no place for it, and the page goes on
  }
  tell();
}

/** Makes an image the current one and brings it into view, below the controls. */
function select(number) {
  if (!shown.length) return;
  cards[current]?.classList.remove("current");
  current = Math.min(Math.max(0, number), shown.length - 1);
  if (current >= cards.length) makeCards(current + 1);
  const chosen = cards[current];
  chosen.classList.add("current");
  const isSticky = getComputedStyle(controls).position === "sticky";
  document.documentElement.style.scrollPadding = `${isSticky ? controls.offsetHeight + 8 : 8}px 0 8px`;
  chosen.scrollIntoView({ block: "nearest" });
  if (!chosen.contains(document.activeElement)) chosen.focus({ preventScroll: true });
}

function tell() {
  const count = (number) => number.toLocaleString("en");
  status.textContent = `${count(shown.length)} of ${count(data.images.length)} images, ${count(marked.size)} marked`;
  save.disabled = marked.size === 0;
}

function showOverlay(isOn) {
  overlay.checked = isOn;
  document.body.classList.toggle("plain", !isOn);
}

save.addEventListener("click", () => {
  const lines = data.images.map((image) => image.line).filter((line) => marked.has(line));
  const address = URL.createObjectURL(new Blob(lines.map((line) => `${line}\n`), { type: "text/plain" }));
  element("a", { href: address, download: "rejected.txt" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
});
overlay.addEventListener("change", () => showOverlay(overlay.checked));
search.addEventListener("input", refresh);
for (const filter of [classFilter, sort, marksFilter]) {
  filter.addEventListener("change", () => {
    current = -1; // another choice begins with its first image
    refresh();
    select(0);
  });
}

const STEPS = {
  j: () => 1, ArrowRight: () => 1, k: () => -1, ArrowLeft: () => -1,
  ArrowDown: () => columns(), ArrowUp: () => -columns(),
};
const columns = () => getComputedStyle(list).gridTemplateColumns.split(" ").length;

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, [type=search]")) return;
  if (event.key in STEPS) select(current + STEPS[event.key]());
  else if (event.key === "x") mark(current);
  else if (event.key === "o") showOverlay(!overlay.checked);
  else return;
  event.preventDefault();
});

const counts = data.classes.map(() => 0);
for (const image of data.images) for (const [number] of image.classes) counts[number]++;
const choose = (value, text, count) => {
  if (count) classFilter.append(element("option", { value, textContent: `${text} (${count.toLocaleString("en")})` }));
};
choose("", "all", data.images.length);
data.classes.forEach(({ name }, number) => choose(String(number), name, counts[number]));
choose(NO_CLASS, "background only", data.images.filter((image) => !image.classes.length && !image.problem).length);
choose(PROBLEM, "with a problem", data.images.filter((image) => image.problem).length);
showOverlay(true); // a browser may bring back how a form was left
refresh();
