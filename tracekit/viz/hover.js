(()=>{for(const p of document.querySelectorAll(".tk-viz:not([data-on])")){p.dataset.on="1";
const say=(e,t)=>{const s=e.closest(".tk-part").querySelector(".tk-say");if(s)s.textContent=t},
clear=e=>e.closest(".tk-part").querySelectorAll(".tk-at,.tk-hot").forEach(x=>x.classList.remove("tk-at","tk-hot")),
move={ArrowLeft:[0,-1],ArrowRight:[0,1],ArrowUp:[-1,0],ArrowDown:[1,0]},
tell=c=>{say(c,c.title);clear(c);if(c.tagName!="TD")return;c.classList.add("tk-at");
const h=c.closest("table").tHead.rows[0].cells[c.cellIndex];h&&h.classList.add("tk-hot");c.parentNode.cells[0].classList.add("tk-hot")};
p.addEventListener("mouseover",e=>{const c=e.target.closest(".tk-grid td,.tk-flow span");c&&tell(c)});
p.addEventListener("keydown",e=>{const d=move[e.key],b=e.target.closest(".tk-scroll"),t=b&&b.querySelector(".tk-grid");if(!d||!t)return;
const at=b.querySelector(".tk-at"),r=t.tBodies[0].rows[at?at.parentNode.sectionRowIndex+d[0]:0],c=r&&r.cells[at?at.cellIndex+d[1]:1];
if(c&&c.tagName=="TD"){e.preventDefault();tell(c);c.scrollIntoView({block:"nearest",inline:"nearest"})}});
for(const g of p.querySelectorAll(".tk-image")){const l=JSON.parse(g.closest("[data-labels]").dataset.labels),n=l.rows.length,m=l.columns.length,box=g.querySelector("b");let v,at=[0,0];
const half=h=>{const e=h>>10&31,f=h&1023,s=h>>15?-1:1;return e==31?(f?NaN:s/0):s*(e?(1+f/1024)*2**(e-15):f*2**-24)},
value=(r,c)=>{if(!v){const b=Uint8Array.from(atob(g.dataset.numbers),x=>x.charCodeAt(0)).buffer;v=g.dataset.bytes=="2"?Array.from(new Uint16Array(b),half):new Float32Array(b)}
return g.dataset.lower=="1"?c>r?0:v[r*(r+1)/2+c]:v[r*m+c]},
look=(r,c)=>{if(r<0||c<0||r>=n||c>=m)return;at=[r,c];const x=value(r,c);box.hidden=false;
box.style.cssText=`left:${100*c/m}%;top:${100*r/n}%;width:${100/m}%;height:${100/n}%`;
g.title=(g.dataset.told?g.dataset.told+", ":"")+l.rows[r]+l.joint+l.columns[c]+": "+(isNaN(x)?"not a number (nan)":+(g.dataset.bytes=="4"?x.toPrecision(7):Math.abs(x)<6.2e-5?x.toFixed(7):x.toPrecision(3)));say(g,g.title)};
g.addEventListener("mousemove",e=>{const b=g.getBoundingClientRect();look(Math.floor((e.clientY-b.top-g.clientTop)/g.clientHeight*n),Math.floor((e.clientX-b.left-g.clientLeft)/g.clientWidth*m))});
g.addEventListener("keydown",e=>{const d=move[e.key];if(d){e.preventDefault();look(at[0]+d[0],at[1]+d[1])}})}
}})()
