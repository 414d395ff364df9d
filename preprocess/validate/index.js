"use strict";
// Draws one page of the table's rows. Texts enter as text, never as markup.
const find = (id) => document.getElementById(id);
const { columns, files, folder } = JSON.parse(find("table").textContent);
const form = find("filters"), fields = form.elements, body = document.querySelector("#summary tbody");
const heads = document.querySelectorAll("#summary th"), frame = document.querySelector("iframe");
const PAGE_ROWS = 100;
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
  const compare = (a, b) => Math.sign(sort) * ((a > b) - (a < b));
  rows.sort((a, b) => {
    const [of, than] = [cellOf(column, a), cellOf(column, b)];
    return compare(of[2], than[2]) || compare(of[1], than[1]) || a - b;
  });
}

function element(tag, properties, ...content) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...content);
  return made;
}

function drawRow(row) {
  const link = { href: `${folder}/${files[row]}`, target: "details" };
  return element("tr", {}, ...columns.map(({ style }, column) => {
    const [kind, text] = cellOf(column, row);
    return element("td", { className: `${style} ${kind}` }, column ? text : element("a", link, text));
  }));
}

function draw() {
  const start = fields.start.value < rows.length ? Number(fields.start.value) : 0;
  const stop = Math.min(start + PAGE_ROWS, rows.length);
  heads.forEach((head, column) => {
    head.ariaSort = { [column + 1]: "ascending", [-column - 1]: "descending" }[fields.sort.value] || "none";
  });
  body.replaceChildren(...rows.slice(start, stop).map(drawRow));
  find("count").textContent = `${stop && start + 1} to ${stop} of ${rows.length}`;
  find("back").disabled = start === 0;
  find("next").disabled = stop === rows.length;
  history.replaceState(null, "", `#${new URLSearchParams(new FormData(form))}`);
}

function change(name, value) {
  fields.start.value = 0;
  fields[name].value = value;
  select();
  draw();
}

heads.forEach((head, column) => {
  head.onclick = () => change("sort", Number(fields.sort.value) === column + 1 ? -column - 1 : column + 1);
});
find("back").onclick = () => change("start", Number(fields.start.value) - PAGE_ROWS);
find("next").onclick = () => change("start", Number(fields.start.value) + PAGE_ROWS);
form.oninput = () => change("sort", fields.sort.value);
body.onclick = (event) => { frame.hidden = event.target.tagName !== "A"; };
form.onsubmit = (event) => event.preventDefault();
const state = new URLSearchParams(location.hash.slice(1));
for (const field of fields) field.value = state.get(field.name) ?? field.value;
change("start", fields.start.value);
