// Documents: those with the text searched for, of the split and task chosen.
const search = document.getElementById("search");
const task = document.getElementById("task");
const found = document.getElementById("found");
const documents = [...document.querySelectorAll("#documents > article")];
document.querySelector(".controls").hidden = false;
let texts = null; // lower case, made when something is first searched for

function filter() {
  texts ??= documents.map((shown) => shown.textContent.toLowerCase());
  const wanted = search.value.toLowerCase();
  let number = 0;
  documents.forEach((shown, i) => {
    shown.hidden = !texts[i].includes(wanted) || (task.value !== "" && shown.dataset.group !== task.value);
    number += !shown.hidden;
  });
  document.getElementById("documents").classList.toggle("unfiltered", wanted + task.value === "");
  found.textContent = `${number} of ${documents.length} shown`;
}

search.addEventListener("input", filter);
task.addEventListener("change", filter);
