'use strict';
// Figures in full size.
const dialog = document.querySelector('dialog');
for (const button of document.querySelectorAll('button.figure')) {
  button.addEventListener('click', () => {
    const shown = dialog.querySelector('img');
    shown.src = button.firstElementChild.src;
    shown.alt = button.firstElementChild.alt;
    dialog.showModal();
  });
}
dialog.addEventListener('click', event => {
  if (event.target === dialog) dialog.close();
});
// Two images of the same noise, one over the other.
const viewer = document.querySelector('.viewer');
if (viewer) {
  const of = name => viewer.querySelector('.' + name);
  const cells = [...document.querySelectorAll('.cell')];
  const find = (row, column) => cells.find(
    cell => cell.dataset.row === row && cell.dataset.column === column);
  const update = () => {
    const column = of('column').value;
    cells.forEach(cell => cell.classList.remove('chosen'));
    for (const side of ['left', 'right']) {
      const select = of(side + '-row');
      const cell = find(select.value, column);
      const name = select.selectedOptions[0].text;
      cell.classList.add('chosen');
      of(side).src = cell.firstElementChild.src;
      of(side).alt = cell.firstElementChild.alt;
      of(side + '-name').textContent = name;
    }
    const notes = ['left', 'right'].map(side => {
      const note = find(of(side + '-row').value, column).dataset.note;
      return note && of(side + '-name').textContent + ': ' + note;
    });
    of('told').textContent = [...new Set(notes)].filter(Boolean).join('; ');
    const pair = of('pair');
    pair.style.setProperty('--at', of('at').value + '%');
    pair.style.setProperty('--zoom', of('zoom').value);
    const difference = of('difference');
    viewer.classList.toggle('difference', !!difference && difference.checked);
  };
  for (const cell of cells) {
    cell.addEventListener('click', () => {
      of('column').value = cell.dataset.column;
      if (cell.dataset.row !== of('left-row').value) {
        of('right-row').value = cell.dataset.row;
      }
      update();
      viewer.scrollIntoView({block: 'nearest'});
    });
  }
  for (const control of viewer.querySelectorAll('input, select')) {
    control.addEventListener('input', update);
  }
  viewer.hidden = false;
  update();
}
