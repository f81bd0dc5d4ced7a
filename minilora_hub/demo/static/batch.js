// The table of a batch: rows only ever append, and every cell is text.
const box = element.querySelector(".ml-batch");
const find = (name) => box.querySelector(name);
let head = "";
let rows = 0;
let saved = null;

function cell(tag, text, name) {
  const one = document.createElement(tag);
  one.textContent = text;
  if (name) one.className = name;
  return one;
}

function row(number, about, names) {
  const line = document.createElement("tr");
  const first = cell("th", about.prompt);
  first.scope = "row";
  line.append(cell("td", String(number), "ml-batch-number"), first);
  if (about.error) {
    const wide = cell("td", about.error, "ml-batch-error");
    wide.colSpan = names.length;
    line.append(wide);
  } else {
    for (const one of about.answers) line.append(cell("td", one.error || one.text, one.error ? "ml-batch-error" : ""));
  }
  return line;
}

function save({ name, type, text }) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const anchor = document.createElement("a");
  anchor.href = address;
  anchor.download = name;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

function paint() {
  const now = props.value;
  if (!now || !now.phase) return;
  box.dataset.phase = now.phase;
  find(".ml-batch-words").textContent = now.words;
  find(".ml-batch-bar").value = now.total ? now.rows.length / now.total : 0;
  find(".ml-batch-stop").hidden = now.phase !== "busy";
  for (const one of box.querySelectorAll("[data-kind]")) one.hidden = !(now.phase === "done" && now.rows.length);
  find(".ml-batch-scroll").hidden = now.rows.length === 0;
  const names = JSON.stringify(now.names);
  if (names !== head || now.rows.length < rows) {
    const line = document.createElement("tr");
    for (const name of ["", "prompt", ...now.names]) line.append(cell("th", name));
    for (const one of line.children) one.scope = "col";
    find("thead").replaceChildren(line);
    find("tbody").replaceChildren();
    rows = 0;
    head = names;
  }
  for (; rows < now.rows.length; rows += 1) find("tbody").append(row(rows + 1, now.rows[rows], now.names));
  if (now.download && now.download !== saved) save(now.download);
  saved = now.download;
}

box.addEventListener("click", (event) => {
  const kind = event.target.closest("[data-kind]")?.dataset.kind;
  if (kind) trigger("select", { kind });
});
find(".ml-batch-stop").addEventListener("click", () => trigger("submit"));
watch("value", paint);
paint();
