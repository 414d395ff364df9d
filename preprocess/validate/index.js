"use strict";
// Draws one page of the table's rows. Texts enter as text, never as markup.
const find = (id) => document.getElementById(id);
const { columns, files, folder } = JSON.parse(find("table").textContent);
const form = find("filters"), fields = form.elements, body = document.querySelector("#summary tbody");
const heads = document.querySelectorAll("#summary th"), PAGE_ROWS = 100;
const cellOf = (column, row) => columns[column].cells[columns[column].rows[row]]; // kind, text, order
let rows = [];

function select() {
  const text = fields.text.value.toLowerCase(), status = fields.status.value, stream = fields.stream.value;
  const hasText = (column, row) => cellOf(column, row)[1].toLowerCase().includes(text);
  rows = files.map((_, row) => row).filter((row) => (!status || cellOf(1, row)[1] === status)
    && (!stream || cellOf(stream, row)[0] !== "full")
    && (!text || hasText(0, row) || hasText(columns.length - 1, row)));
  const sort = Number(fields.sort.value), column = Math.abs(sort) - 1;
  if (!columns[column]) return;
  const compare = (a, b) => (a > b) - (a < b);
  rows.sort((a, b) => {
    const [, textA, orderA] = cellOf(column, a), [, textB, orderB] = cellOf(column, b);
    return Math.sign(sort) * (compare(orderA, orderB) || compare(textA, textB)) || a - b;
  });
}

function element(tag, content, className = "") {
  const made = document.createElement(tag);
  made.append(content);
  made.className = className;
  return made;
}

function drawRow(row) {
  const link = element("a", cellOf(0, row)[1]);
  link.href = `${folder}/${files[row]}`;
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    fields.open.value = fields.open.value === files[row] ? "" : files[row];
    draw();
  });
  const drawn = element("tr", element("td", link, "session"));
  columns.slice(1).forEach(({ style }, index) => {
    const [kind, text] = cellOf(index + 1, row);
    drawn.append(element("td", text, `${style} ${kind}`));
  });
  if (fields.open.value !== files[row]) return [drawn];
  const frame = element("iframe", "");
  frame.src = link.href;
  const details = element("td", frame);
  details.colSpan = columns.length;
  return [drawn, element("tr", details)];
}

function draw() {
  const last = Math.floor(Math.max(0, rows.length - 1) / PAGE_ROWS) * PAGE_ROWS;
  const start = Math.min(Number(fields.start.value) || 0, last);
  fields.start.value = start;
  heads.forEach((head, index) => {
    head.ariaSort = { [index + 1]: "ascending", [-index - 1]: "descending" }[fields.sort.value] || "none";
  });
  body.replaceChildren(...rows.slice(start, start + PAGE_ROWS).flatMap(drawRow));
  find("count").textContent = `${rows.length && start + 1} to ${Math.min(start + PAGE_ROWS, rows.length)} of ${rows.length}`;
  find("back").disabled = start === 0;
  find("next").disabled = start === last;
  history.replaceState(null, "", `#${new URLSearchParams(new FormData(form))}`);
}

function restart() {
  fields.start.value = 0;
  select();
  draw();
}

heads.forEach((head, index) => head.addEventListener("click", () => {
  fields.sort.value = Number(fields.sort.value) === index + 1 ? -index - 1 : index + 1;
  restart();
}));
[["back", -PAGE_ROWS], ["next", PAGE_ROWS]].forEach(([id, step]) => find(id).addEventListener("click", () => {
  fields.start.value = Number(fields.start.value) + step;
  draw();
}));
form.addEventListener("input", restart);
form.addEventListener("submit", (event) => event.preventDefault());
const state = new URLSearchParams(location.hash.slice(1));
for (const field of fields) if (state.has(field.name)) field.value = state.get(field.name);
select();
draw();
