(()=>{for(const p of document.querySelectorAll(".tk-viz:not([data-on])")){p.dataset.on="1";
const tell=c=>{const b=c.closest(".tk-part"),s=b&&b.querySelector(".tk-say");if(!s)return;s.textContent=c.title||c.dataset.tip||"";
b.querySelectorAll(".tk-at,.tk-hot").forEach(x=>x.classList.remove("tk-at","tk-hot"));if(c.tagName!="TD")return;c.classList.add("tk-at");
const t=c.closest("table"),h=t.tHead.rows[0].cells[c.cellIndex];h&&h.classList.add("tk-hot");c.parentNode.cells[0].classList.add("tk-hot")};
p.addEventListener("mouseover",e=>{const c=e.target.closest(".tk-grid td,.tk-flow span");c&&tell(c)});
p.addEventListener("keydown",e=>{const d={ArrowLeft:[0,-1],ArrowRight:[0,1],ArrowUp:[-1,0],ArrowDown:[1,0]}[e.key],b=e.target.closest(".tk-scroll");if(!d||!b)return;
const t=b.querySelector(".tk-grid");if(!t)return;const at=b.querySelector(".tk-at"),r=at?at.parentNode.sectionRowIndex+d[0]:0,k=at?at.cellIndex+d[1]:1;
const c=t.tBodies[0].rows[r]&&t.tBodies[0].rows[r].cells[k];if(c&&c.tagName=="TD"){e.preventDefault();tell(c);c.scrollIntoView({block:"nearest",inline:"nearest"})}});
}})()
